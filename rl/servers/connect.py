"""The beginning: a server is looked for, asked who it is, and refused if it is not the run's."""

import functools
from pathlib import Path

import jax

from checkpoints.convert import source_of_policy
from data.chat import jinja_of
from errors import UserError
from rl.config import ReinforceConfig, SamplingConfig
from rl.servers.api import API
from rl.servers.checks import check_fields, check_logprobs, check_model, check_tokenizer
from rl.servers.export import Exports
from rl.servers.http import Address
from rl.servers.server import Server
from rl.servers.sglang import SGLang
from rl.servers.vllm import VLLM
from train.setup import Setup

APIS: dict[str, type[API]] = {"vllm": VLLM, "sglang": SGLang}  # sampling.server_api


def connect(
    setup: Setup,
    sampling: SamplingConfig,
    reinforce: ReinforceConfig,
    workdir: Path,
    template: str,
    *,
    corrects: bool,
) -> Server | None:
    """Returns the server that `sampling.server` names; None where it names none.

    It is waited for. What it says, and what a run with it has not, goes to standard output.

    Args:
      workdir: of the run, which has the directory of weights unless `sampling.server_weights` does.
      template: `data.chat_template`, for the checkpoints that are handed over.
      corrects: whether the algorithm corrects for what the server's rounding makes of log-probs.

    Raises UserError: fields ask of a server what none does, no architecture expresses the model, or
    the server stays away, has another tokenizer, or does not return what is learnt from.
    """
    if not sampling.server:
        return None
    check_fields(sampling, reinforce)
    if jax.process_count() > 1:
        raise UserError(
            f"sampling.server = {sampling.server!r}: a run of {jax.process_count()} processes has "
            "its policy in parts, and one process asks a server; use one process, or no server"
        )
    capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
    source = functools.partial(
        _source, setup=setup, workdir=workdir, template=template, context=capacity
    )
    directory = Path(sampling.server_weights) if sampling.server_weights else workdir / "served"
    exports = Exports(directory, workdir, sampling.dtype or setup.model.dtype, source)
    api = APIS[sampling.server_api]()
    address = Address(sampling.server, sampling.server_timeout)
    server = Server(api, address, sampling.server_retries, exports)
    check_model(server, capacity)
    check_tokenizer(server, setup.tokenizer)
    check_logprobs(server, setup.tokenizer, sampling.temperature)
    print(
        f"{'server':<12}{api.name} at {server.url}, {server.model}; weights in {exports.dtype} by "
        f"{directory.resolve()}; no experts, keys or ids drawn from are recorded",
        flush=True,
    )
    if not corrects:
        print(
            "warning: sampling.server: the algorithm does not correct for log-probs that another "
            "engine rounds otherwise; add correction=token_truncate",
            flush=True,
        )
    return server


def _source(
    variables: dict, name: str, *, setup: Setup, workdir: Path, template: str, context: int
):
    chat = jinja_of(template)
    return source_of_policy(variables, workdir, setup.model, setup.tokenizer, chat, context, name)
