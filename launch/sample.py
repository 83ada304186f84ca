"""Writes on: from a prompt, as the assistant of a chat, or into the gap between a prefix and a
suffix. Tokens appear as they are sampled.

    python -m launch.sample --workdir=runs/quickstart/sparse --prompt="def add(a, b):" python -m
    launch.sample --workdir=runs/quickstart/reinforce --chat="A zoo has 7 lions. 3 leave. 5 are
    born. How many lions now?" python -m launch.sample --workdir=hf:DIR --chat="What is 17 x 23?"
    a Hugging Face checkpoint, by its own chat template python -m launch.sample
    --workdir=runs/quickstart/sparse --infill --prefix="def add(a, b):\\n" --suffix="\\n    return
    c\\n" python -m launch.sample --workdir=runs/quickstart/reinforce                     reads
    prompts from standard input, a line each

A prefix, suffix or prompt that begins with @ names a file. \\n and \\t are read as line end and
tab.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from data.chat import encode_prompt
from data.fim import fim_prompt
from data.decode_stream import DecodeStream
from errors import UserError
from experiment.command_line import Flag, command
from experiment.schema import Config
from experiment.setup import run_variables, set_up
from model.decode import decode_weights, jitted_step, prefill
from model.sharding import batch_shards
from rl.rollout import pad_prompts
from rl.sampler import draw
from train.setup import Setup

BUCKET = 64  # prompts are padded to a multiple of this, so that few lengths are compiled


def run(
    config: Config, workdir: Path, prompt: str, chat: str, infill: bool, prefix: str, suffix: str
) -> None:
    if sum(map(bool, (prompt, chat, infill))) > 1:
        raise UserError("give one of --prompt, --chat and --infill")
    if (prefix or suffix) and not infill:
        raise UserError("--prefix and --suffix go with --infill")
    begin = set_up(config, workdir, rows=0, trains=False)
    with jax.set_mesh(begin.mesh):
        variables = run_variables(begin, config.init_from, workdir)
        write = functools.partial(
            stream, config, begin, variables, jitted_step(begin.model, config.sampling.attention)
        )
        if prompt:
            text = given(prompt)
            print(text, end="")
            write(
                ([begin.tokenizer.bos] if begin.tokenizer.bos is not None else [])
                + begin.tokenizer.encode(text)
            )
        elif chat:
            write(chat_ids(config, begin, given(chat)))
        elif infill:
            print(given(prefix), end="")
            write(
                fim_prompt(
                    given(prefix), given(suffix), begin.tokenizer, spm=config.data.infills_spm
                ),
                end=given(suffix),
            )
        else:
            for line in sys.stdin:
                write(chat_ids(config, begin, line.strip()))


def given(text: str) -> str:
    """The text itself, or that of the file it names by @."""
    if not text.startswith("@"):
        return text.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{text[1:]}: cannot read: {failure}") from failure


def chat_ids(config: Config, begin: Setup, question: str) -> list[int]:
    return encode_prompt(
        [{"role": "user", "content": question}], begin.tokenizer, config.data.chat_template
    )


def stream(config: Config, begin: Setup, variables: dict, step_fn, ids: list[int], end: str = "") -> None:
    """Prints a completion token by token, then `end`."""
    if not ids:
        raise UserError("nothing to go on from: the prompt is empty")
    decoder = DecodeStream(begin.tokenizer)
    for token in tokens(config, begin, variables, step_fn, ids):
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush() + end, flush=True)


def tokens(config: Config, begin: Setup, variables: dict, step_fn, ids: list[int]) -> Iterator[int]:
    """Sampled ids until the end of text or sampling.max_new_tokens."""
    sampling = config.sampling
    width = -(-len(ids) // BUCKET) * BUCKET
    rows = batch_shards(
        begin.mesh
    )  # the same on each of the devices that rows are spread over: the first is shown
    prompt = pad_prompts([ids] * rows, width, begin.tokenizer.pad)
    slots, stage = width + sampling.max_new_tokens, sampling.attention
    read = jax.jit(
        functools.partial(
            prefill, begin.model, slots=slots, stage=stage, attention_top_p=sampling.attention_top_p
        )
    )
    cache, logits_BV = read(
        variables, jnp.asarray(prompt.tokens_PT), jnp.asarray(prompt.segments_PT)
    )
    weights = decode_weights(begin.model, variables, rows)
    key = jax.random.key(config.seed)
    choose = jax.jit(functools.partial(draw, sampling))
    for at in range(sampling.max_new_tokens):
        token_B, _, _ = choose(
            logits_BV, jnp.repeat(jax.random.split(jax.random.fold_in(key, at), 1), rows)
        )
        token = int(token_B[0])
        if token in begin.tokenizer.stops:
            return
        yield token
        cache, logits_BV = step_fn(weights, token_B, cache)


FLAGS = {
    "prompt": Flag("", "text to go on from"),
    "chat": Flag("", "what the user says"),
    "infill": Flag(False, "write between --prefix and --suffix"),
    "prefix": Flag("", "of the gap"),
    "suffix": Flag("", "of the gap"),
}

if __name__ == "__main__":
    command(run, config="recorded", flags=FLAGS)
