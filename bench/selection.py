"""Times the indexer's selection by counting, `jax.lax.top_k` alone, and the mask made from it.

    python -m bench.selection

All get the same inputs in one process; the figures are the minimum of 10.
"""

import json
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax import Array

from experiment.command_line import command
from kernels.reference import masked_scores, select_topk

SHAPES = (  # (scores [B, T, S], top k)
    ((8, 256, 256), 64),  # tiny-dsv3
    ((16, 256, 256), 32),  # the quickstart's training
    ((128, 80, 80), 32),  # the quickstart's reinforcement
)
REPEATS = 10


def topk_mask(scores_BTS: Array, allowed_BTS: Array, topk: int) -> Array:
    """Makes the same selection from a top_k, bool [B, T, S].

    The last value and index of the top_k bound the selection in (score, position) order.
    """
    scores_BTS = masked_scores(scores_BTS, allowed_BTS)
    value_BTk, index_BTk = jax.lax.top_k(scores_BTS, topk)
    tied_BTS = (scores_BTS == value_BTk[..., -1:]) & (
        jnp.arange(scores_BTS.shape[-1]) <= index_BTk[..., -1:]
    )
    return ((scores_BTS > value_BTk[..., -1:]) | tied_BTS) & allowed_BTS


def milliseconds(function: Callable, scores_BTS: Array) -> float:
    """Times a compiled call and returns the minimum of REPEATS."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(scores_BTS))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(scores_BTS))
        times.append(time.perf_counter() - began)
    return round(min(times) * 1e3, 2)


def main() -> None:
    """Times every shape and prints one JSON line."""
    rows = []
    for shape, topk in SHAPES:
        scores_BTS = jax.nn.relu(jax.random.normal(jax.random.key(0), shape))
        allowed_BTS = jnp.broadcast_to(jnp.tril(jnp.ones(shape[1:], bool)), shape)
        rivals = {
            "top_k": lambda s, a=allowed_BTS, k=topk: jax.lax.top_k(masked_scores(s, a), k),
            "top_k_mask": lambda s, a=allowed_BTS, k=topk: topk_mask(s, a, k),
            "counting": lambda s, a=allowed_BTS, k=topk: select_topk(s, a, k),
        }
        same = bool((rivals["top_k_mask"](scores_BTS) == rivals["counting"](scores_BTS)).all())
        rows.append(
            {"shape": shape, "k": topk, "same": same}
            | {f"{name}_ms": milliseconds(f, scores_BTS) for name, f in rivals.items()}
        )
    about = {"device": jax.devices()[0].device_kind, "jax": version("jax")}
    print(json.dumps({"bench": "selection"} | about | {"rows": rows}))


if __name__ == "__main__":
    command(main, config="none", workdir=False)
