"""Counts the passes over a row's scores that the selection takes to find the 2048th best.

    python -m bench.passes

Their number depends on the row's length and on what its scores are like. Eight rows are searched at
a time, as in the kernels, and end together. The figures are counts, so the same on every device;
nothing is timed. One JSON line.
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
LOUD_HEADS = 8


def weighted(rng: np.random.Generator, L: int) -> np.ndarray:
    """Draws weighted rectified normals: an indexer that has learned nothing."""
    scores = (
        rng.normal(size=(ROWS, 1)) * np.maximum(rng.normal(size=(ROWS, L)), 0) for _ in range(HEADS)
    )
    return sum(scores, np.zeros((ROWS, L)))


def heavy(rng: np.random.Generator, L: int) -> np.ndarray:
    """Draws scores of few heads, each of which scores few keys, some very high; most are zero."""
    loud = np.exp(rng.normal(size=(ROWS, L)))
    scores = (
        np.exp(rng.normal(size=(ROWS, 1))) * np.maximum(loud * rng.normal(size=(ROWS, L)) - 2.5, 0)
        for _ in range(LOUD_HEADS)
    )
    return sum(scores, np.zeros((ROWS, L)))


def empty(rng: np.random.Generator, L: int) -> np.ndarray:
    """Draws half as many scores that are not zero as are selected: the bound is a tie."""
    return np.where(rng.random((ROWS, L)) * L < TOPK // 2, np.exp(rng.normal(size=(ROWS, L))), 0.0)


KINDS = {"weighted": weighted, "heavy": heavy, "empty": empty}


def passes(scores_RS: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Searches for the threshold of some rows as the kernel does, and counts the passes.

    Args:
      scores_RS: scores of R rows.
      topk: how many keys are selected.

    Returns: the threshold, how many scores are at or above it, and how often `find_threshold`
    counted; the kernel's counts before that search are not included.
    """
    _counted.clear()
    threshold, at = jax.tree.map(np.asarray, _search(jnp.asarray(scores_RS, jnp.float32), topk))
    jax.effects_barrier()
    return threshold, at, len(_counted)


_counted = []  # an element for each pass


@functools.partial(jax.jit, static_argnums=1)
def _search(scores_RS: Array, topk: int) -> tuple[Array, Array]:
    def count_at_least(level_R1):
        jax.debug.callback(lambda: _counted.append(1))
        return jnp.sum(scores_RS >= level_R1, axis=1, keepdims=True, dtype=jnp.int32)

    allowed = jnp.full((len(scores_RS), 1), scores_RS.shape[1], jnp.int32)
    total, squares = (jnp.sum(x, axis=1, keepdims=True) for x in (scores_RS, scores_RS**2))
    low, high = (fold(scores_RS, axis=1, keepdims=True) for fold in (jnp.min, jnp.max))
    guess = normal_quantile(total, squares, allowed, topk)
    found = find_threshold(count_at_least, allowed, allowed <= topk, low, high, guess, topk)
    return found.level, found.at_level


def main() -> None:
    """Counts the passes of every length and kind of scores."""
    rows = []
    for L in LENGTHS:
        for name, draw in KINDS.items():
            counts = [passes(draw(np.random.default_rng(s), L), TOPK)[2] for s in range(SEEDS)]
            rows.append(
                {
                    "length": L,
                    "scores": name,
                    "tied": name == "empty",
                    "mean": round(statistics.mean(counts), 1),
                    "most": max(counts),
                }
            )
    about = {"topk": TOPK, "rows_together": ROWS, "seeds": SEEDS}
    print(json.dumps({"bench": "passes"} | about | {"rows": rows, "jax": version("jax")}))


if __name__ == "__main__":
    command(main, config="none", workdir=False)
