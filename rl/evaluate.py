"""pass@k, and the intervals around it and around a pass rate."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over problems and the bootstrap interval around it."""

    mean: float
    low: float
    high: float


def pass_at_k(n: np.ndarray | int, c: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
    """Estimates the chance that at least one of k completions is correct, without bias.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{j < k} (n - c - j) / (n - j)

    (Codex, arXiv 2107.03374, eq. 1.) The product never overflows, and is 0 as soon as fewer than k
    completions are wrong. The plug-in estimate 1 - (1 - c/n)^k is too low.

    Args:
      n: completions sampled. All three are integers, or integer arrays that broadcast.
      c: the correct ones among them.
      k: at most n.

    Returns:
      float64 of the broadcast shape.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (n, c, k)))
    if np.any((c < 0) | (c > n) | (k < 1) | (k > n)):
        raise ValueError("pass@k needs 0 <= c <= n and 1 <= k <= n")
    all_wrong = np.ones(n.shape)
    for j in range(int(k.max(initial=0))):
        drawn = j < k
        all_wrong = np.where(
            drawn, all_wrong * np.maximum(n - c - j, 0) / np.where(drawn, n - j, 1), all_wrong
        )
    return 1 - all_wrong


def bootstrap(values: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Returns the mean of one value per problem, with its percentile bootstrap interval.

    Problems are resampled, not completions: the interval says how much the score would move on
    other problems of the same kind. The same seed and number of problems draw the same problems, so
    to compare two models bootstrap their differences, problem by problem.

    Args:
      values: [P], one number per problem, P >= 1.
      resamples: how often P problems are drawn.
      level: the share of resampled means inside the interval.

    Raises:
      ValueError: `values` has another shape.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"bootstrap needs one value per problem, [P] with P >= 1, not shape {values.shape}"
        )
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(successes: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a share, for one problem (Wilson, 1927).

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = successes / n

    Unlike p +- z sqrt(p (1 - p) / n) it has a width where a problem is solved never or always, and
    stays within 0 and 1.

    Args:
      tries: n, at least 1.
      z: the normal quantile of the level, here of 95 %.
    """
    share, add = successes / tries, z * z / tries
    middle = share + add / 2
    width = (add * (share * (1 - share) + add / 4)) ** 0.5
    return max((middle - width) / (1 + add), 0.0), min((middle + width) / (1 + add), 1.0)


def pass_at_k_table(
    correct_PG: np.ndarray, ks: Sequence[int], resamples: int, seed: int, level: float = 0.95
) -> dict[int, Interval]:
    """Returns pass@k for each k, averaged over problems, with its interval.

    Args:
      correct_PG: bool, or 0 and 1, of P problems and G completions of each. Whoever has rewards in
        between decides first which of them is a success.
      ks: each at most G. Greedy completions are all the same, and their pass@k is flat in k.
      resamples, seed, level: as in `bootstrap`.

    Raises:
      ValueError: a value is neither 0 nor 1.
    """
    correct_PG = np.asarray(correct_PG)
    if not np.isin(correct_PG, (0, 1)).all():
        raise ValueError("pass@k counts successes: every value must be 0 or 1")
    n, c_P = correct_PG.shape[1], correct_PG.astype(bool).sum(axis=1)
    return {
        k: bootstrap(pass_at_k(n, c_P, k), resamples=resamples, seed=seed, level=level) for k in ks
    }
