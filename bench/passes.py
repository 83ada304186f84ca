"""How often the selection counts a row's scores until it has the bound of its 2048 best: by the
row's length and by what its scores are like.

    python -m bench.passes

Eight rows are searched together, as in the kernels, and end together. Counted, so the same on every
device; nothing is timed. One JSON line.
"""

import functools
import json
import statistics
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiment.command_line import command
from kernels.selection import ROWS
from kernels.threshold import find_threshold, normal_quantile

LENGTHS = (8_192, 32_768, 131_072)
TOPK, HEADS, SEEDS = 2_048, 64, 16


def weighted(rng: np.random.Generator, L: int) -> np.ndarray:
    """Weighted rectified normals: an indexer that has learned nothing."""
    return sum(
        rng.normal(size=(ROWS, 1)) * np.maximum(rng.normal(size=(ROWS, L)), 0) for _ in range(HEADS)
    )


def heavy(rng: np.random.Generator, L: int) -> np.ndarray:
    """A few heads that answer to few keys, and to some of them very strongly: most scores are
    zeros.
    """
    loud = np.exp(rng.normal(size=(ROWS, L)))
    return sum(
        np.exp(rng.normal(size=(ROWS, 1))) * np.maximum(loud * rng.normal(size=(ROWS, L)) - 2.5, 0)
        for _ in range(8)
    )


def empty(rng: np.random.Generator, L: int) -> np.ndarray:
    """Half as many keys of another score than zero as shall be chosen: the bound is a tie."""
    return np.where(rng.random((ROWS, L)) * L < TOPK // 2, np.exp(rng.normal(size=(ROWS, L))), 0.0)


KINDS = {"weighted": weighted, "heavy": heavy, "empty": empty}


def passes(scores_RS: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(threshold, scores at or above it, passes) by `find_threshold`, begun as the kernel begins
    it; what the kernel counts before is not among them.
    """
    _tried.clear()
    threshold, at = jax.tree.map(np.asarray, _search(jnp.asarray(scores_RS, jnp.float32), topk))
    jax.effects_barrier()
    return threshold, at, len(_tried)


_tried = []  # an element for each count


@functools.partial(jax.jit, static_argnums=1)
def _search(scores_RS: Array, topk: int) -> tuple[Array, Array]:
    def count(level):
        jax.debug.callback(lambda: _tried.append(1))
        return jnp.sum(scores_RS >= level, axis=1, keepdims=True, dtype=jnp.int32)

    allowed = jnp.full((len(scores_RS), 1), scores_RS.shape[1], jnp.int32)
    total, squares = (jnp.sum(x, axis=1, keepdims=True) for x in (scores_RS, scores_RS**2))
    low, high = (fold(scores_RS, axis=1, keepdims=True) for fold in (jnp.min, jnp.max))
    guess = normal_quantile(total, squares, allowed, topk)
    return find_threshold(count, allowed, allowed <= topk, low, high, guess, topk)[:2]


def main() -> None:
    rows = []
    for L in LENGTHS:
        for name, drawn in KINDS.items():
            found = [
                passes(drawn(np.random.default_rng(seed), L), TOPK)[2] for seed in range(SEEDS)
            ]
            rows.append(
                {
                    "length": L,
                    "scores": name,
                    "tied": name == "empty",
                    "mean": round(statistics.mean(found), 1),
                    "most": max(found),
                }
            )
    print(
        json.dumps(
            {
                "bench": "passes",
                "topk": TOPK,
                "rows_together": ROWS,
                "seeds": SEEDS,
                "rows": rows,
                "jax": version("jax"),
            }
        )
    )


if __name__ == "__main__":
    command(main, config="none", workdir=False)
