"""Measures the engine beside a plain loop: one batch at a time, until its longest row ends.

    python -m bench.engine

On configs/tiny_dsv3.py in float32, with prompts of 32 tokens and completions of at most 128. Both
take the same prompts by turns, in one process; a ratio is of tokens per second, the engine's to the
loop's, and above 1 the engine is faster. Compilation is in no time. In `equal` every completion has
128 tokens, and there are as many as slots; in `ragged` lengths are drawn geometrically, with a mean
of a quarter of that, and there are eight times as many. Prints one JSON line.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bench.workload import machine, random_prompts, tiny_dsv3_config
from experiment.command_line import Flag, command
from model.config import ModelConfig
from model.decode import prefill, read
from model.decode_weights import decode_weights
from model.heads import logits_of
from model.sharding import make_mesh
from rl.config import SamplingConfig
from rl.draw import draw
from rl.engine import Engine
from rl.request import Prompt
from train.state import fresh_state

REPEATS = 7


def plain_loop(
    model: ModelConfig,
    sampling: SamplingConfig,
    variables: dict,
    tokens_BT: Array,
    count_B: Array,
    key_B: Array,
    left_B: Array,
) -> Array:
    """Samples a completion of `left_B` tokens in every row of one batch. Returns tokens_BC."""
    rows, new = len(left_B), sampling.max_new_tokens
    capacity = tokens_BT.shape[1] + new
    cache, hidden_BD, _ = prefill(
        model, variables, tokens_BT, count_B, capacity, sampling.attention
    )
    logits_BV = logits_of(model, variables["params"], hidden_BD)
    weights = decode_weights(model, variables, rows)

    def body(state: tuple) -> tuple:
        cache, logits_BV, tokens_BC, step = state
        keys_B = jax.vmap(jax.random.fold_in)(key_B, cache.length_B)
        token_B = draw(sampling, logits_BV, keys_B).token_B
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(step < left_B, token_B, -1))
        ones_B = jnp.ones_like(token_B)
        cache, hidden_B1D, *_ = read(
            model, weights, token_B[:, None], ones_B, cache, sampling.attention
        )
        return cache, logits_of(model, weights.params, hidden_B1D[:, 0]), tokens_BC, step + 1

    begin = cache, logits_BV, jnp.full((rows, new), -1, jnp.int32), jnp.zeros((), jnp.int32)
    longest = jnp.max(left_B)
    return jax.lax.while_loop(lambda state: state[3] < longest, body, begin)[2]


def with_lengths(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """Returns the prompts with completions of geometric length, a quarter of theirs on average."""
    rng, most = np.random.default_rng(seed), prompts[0].max_new_tokens
    lengths = np.minimum(rng.geometric(4 / most, len(prompts)), most)
    return [
        dataclasses.replace(prompt, max_new_tokens=int(length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def run(rows: int) -> None:
    """Takes both by turns and prints the ratios."""
    config = tiny_dsv3_config()
    model, sampling, mesh = config.model, config.sampling, make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = fresh_state(model, optax.identity(), mesh, jax.random.key(0)).variables
    engine = Engine(model, mesh, sampling, rows=rows)
    loop = jax.jit(functools.partial(plain_loop, model, sampling))

    def by_loop(prompts: list[Prompt]) -> None:
        for first in range(0, len(prompts), rows):
            some = prompts[first : first + rows]
            with jax.set_mesh(mesh):
                np.asarray(
                    loop(
                        variables,
                        np.asarray([prompt.tokens for prompt in some], np.int32),
                        np.asarray([len(prompt.tokens) for prompt in some], np.int32),
                        jax.random.wrap_key_data(jnp.stack([p.keys_G2[0] for p in some])),
                        np.asarray([prompt.max_new_tokens for prompt in some], np.int32),
                    )
                )

    def by_engine(prompts: list[Prompt]) -> None:
        with engine.loaded(variables):
            for _ in engine.run(prompts):
                pass

    def ratios(case: Callable[[int], list[Prompt]]) -> dict[str, float]:
        """Returns the ratio of each repeat's times, and the engine's tokens a second."""
        found, speeds = [], []
        for repeat in range(-1, REPEATS):
            prompts, times = case(repeat + 1), []
            for take in (by_loop, by_engine):
                began = time.perf_counter()
                take(prompts)
                times.append(time.perf_counter() - began)
            if repeat >= 0:
                found.append(times[0] / times[1])
                speeds.append(sum(prompt.max_new_tokens for prompt in prompts) / times[1])
        return {
            "ratio": round(statistics.median(found), 3),
            "ratio_least": round(min(found), 3),
            "ratio_most": round(max(found), 3),
            "tokens_per_s": round(statistics.median(speeds), 1),
        }

    equal = ratios(lambda seed: random_prompts(seed, rows, model, sampling))
    ragged = ratios(
        lambda seed: with_lengths(random_prompts(seed, 8 * rows, model, sampling), seed)
    )
    about = {"rows": rows} | machine()
    figures = {f"equal_{name}": value for name, value in equal.items()}
    figures |= {f"ragged_{name}": value for name, value in ragged.items()}
    print(json.dumps({"bench": "engine"} | figures | about))


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={"rows": Flag(64, "slots, and rows of the loop's batch")},
    )
