"""From problems to completions: prompts, the engine, and what it wrote as text."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from data.chat import encode_prompt
from data.tasks.problem import Problem
from data.tokenizer import Tokenizer
from errors import UserError
from model.config import ModelConfig
from model.sharding import batch_shards
from rl.budgets import sampling_budget
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.engines import AnyEngine
from rl.problems import prompt_of
from rl.records import check_fits
from rl.request import Prompt, keys_of
from rl.servers.engine import ServerEngine
from rl.servers.server import Server
from rl.slots import empty_slots
from rl.spans import spans_of
from rl.trajectory import LENGTH, Role, Trajectory
from train.setup import Setup


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was sampled after a prompt, as tokens and as text."""

    trajectory: Trajectory
    text: str

    @property
    def truncated(self) -> bool:
        """Whether it was cut before its stop token."""
        return self.trajectory.ended == LENGTH

    @property
    def interrupted(self) -> bool:
        """Whether something was put into its mouth: its thought was cut (`sampling.thinking`)."""
        return bool(np.any(self.trajectory.roles_T == Role.INJECTED))

    @property
    def length(self) -> int:
        """How many tokens were sampled."""
        return int(np.sum(self.trajectory.sampled_T))


class Generator:
    """Samples completions of problems, with whatever variables it is given.

    Args:
      sampling: how, and how much of a device's memory its slots may take.
      template: how prompts are written, `data.chat_template`.
      completions: how many are asked for at a time, in all; the engine has no more slots.
      group_size: how many of them are of one problem, most of the time.
      record: which of `rl.records.RECORDS` completions have, unless it is asked for none.
      server: that samples in place of this process, which then has no slots and no records.

    Raises UserError if a slot, or the records of so many completions, take more than is allowed, or
    `sampling.thinking` does not fit.
    """

    def __init__(
        self,
        setup: Setup,
        sampling: SamplingConfig,
        template: str,
        *,
        completions: int,
        group_size: int,
        record: Collection[str] = (),
        server: Server | None = None,
    ):
        self._setup, self.sampling, self.template = setup, sampling, template
        self._budget = sampling_budget(setup.tokenizer, template, sampling)
        self._opening = opening(setup.tokenizer, template)
        self.engine: AnyEngine
        if server is not None:
            requests = min(completions, sampling.slots)
            vocab_size = setup.model.vocab_size
            self.engine = ServerEngine(server, sampling, vocab_size, requests=requests)
            return
        model = dataclasses.replace(setup.model, dtype=sampling.dtype or setup.model.dtype)
        rows = slots_that_fit(model, setup.mesh, sampling, completions)
        check_fits(model, sampling, record, completions)
        self.engine = Engine(
            model,
            setup.mesh,
            sampling,
            rows=rows,
            group_size=group_size,
            pad=setup.tokenizer.pad,
            record=record,
        )

    def groups(
        self,
        variables: dict,
        problems: Sequence[Problem],
        key: Array,
        numbers: Sequence[int],
        group_size: int,
        *,
        recording: bool = True,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (place, completions) for each problem, as soon as its last completion ends.

        Args:
          key: with a problem's number it decides what its completions are.
          numbers: a number for each problem.
          group_size: completions of each.
          recording: whether they have records, where the engine makes any.

        Raises UserError for a prompt longer than sampling.max_prompt_tokens.
        """
        keys_PG2 = keys_of(key, numbers, group_size)
        prompts = [
            self.prompt(problem, keys_G2, place)
            for place, (problem, keys_G2) in enumerate(zip(problems, keys_PG2, strict=True))
        ]
        ended: dict[int, list[Trajectory]] = {}
        with self.engine.loaded(variables, recording=recording):
            for trajectory in self.engine.run(prompts):
                group = ended.setdefault(trajectory.group, [])
                group.append(trajectory)
                if len(group) == group_size:
                    in_order = sorted(ended.pop(trajectory.group), key=lambda each: each.sample)
                    yield trajectory.group, list(map(self.completion, in_order))

    def prompt(self, problem: Problem, keys_G2: np.ndarray, group: int) -> Prompt:
        """Returns what the engine is asked for: G completions of a problem.

        Args:
          keys_G2: their random keys, see `rl.request.keys_of`.
          group: a number for them.

        Raises UserError if the template cannot write it.
        """
        tokenizer = self._setup.tokenizer
        ids = prompt_of(problem, tokenizer, self.template)
        if self._budget:
            return self._budget.prompt(ids, keys_G2, group)
        return Prompt(ids, keys_G2, self.sampling.max_new_tokens, tokenizer.stops, group=group)

    def completion(self, trajectory: Trajectory) -> Completion:
        """Returns what a trajectory says, with the spans of its parts."""
        tokenizer = self._setup.tokenizer
        ids = [token for token in trajectory.completion if token not in tokenizer.stops]
        trajectory = dataclasses.replace(trajectory, spans=spans_of(trajectory, tokenizer))
        return Completion(trajectory, self._opening + completion_text(ids, tokenizer))


def slots_that_fit(
    model: ModelConfig, mesh: Mesh, sampling: SamplingConfig, completions: int
) -> int:
    """Returns how many slots there are to be: one a completion, or as many as are allowed.

    `sampling.slots` and `sampling.cache_gib` say how many that is on each device. Says on standard
    output what it comes to.

    Raises UserError if not even one slot fits.
    """
    capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
    slot_bytes = _slot_bytes(model, sampling, capacity)
    per_device = int(sampling.cache_gib * 2**30 // slot_bytes)
    if not per_device:
        raise UserError(
            f"sampling.cache_gib = {sampling.cache_gib}: one slot of {capacity:,} tokens takes "
            f"{slot_bytes / 2**30:.2f} GiB; raise it, or lower sampling.max_new_tokens"
        )
    devices = batch_shards(mesh)
    slots = min(completions, sampling.slots * devices, per_device * devices)
    if jax.process_index() == 0:
        token = (_slot_bytes(model, sampling, 2 * capacity) - slot_bytes) // capacity
        size = f"{slots:,} slots of {slot_bytes / 2**20:.2f} MiB, {token:,} B a token"
        most = f"{per_device * devices:,} fit sampling.cache_gib"
        print(f"{'sampling':<12}{size}; {most}", flush=True)
    return slots


def _slot_bytes(model: ModelConfig, sampling: SamplingConfig, tokens: int) -> int:
    """Returns the bytes of a slot with room for so many tokens."""
    slot = jax.eval_shape(lambda: empty_slots(model, sampling, 1, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slot))


def completion_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decodes what an assistant wrote, with tags such as <think>."""
    return tokenizer.decode(ids, skip_special_tokens=False)


def opening(tokenizer: Tokenizer, template: str) -> str:
    """Returns what a text begins with as if the model had written it: "<think>" or nothing.

    Some checkpoints' templates put <think> at the end of the prompt.
    """
    cue = encode_prompt([{"role": "user", "content": "?"}], tokenizer, template)
    thinks = tokenizer.decode(cue, skip_special_tokens=False).rstrip().endswith("<think>")
    return "<think>" if thinks else ""
