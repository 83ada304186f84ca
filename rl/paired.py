"""Two runs on the same problems: differences, where curves of pass@k cross, and the gap to a base.

Every interval is a bootstrap over problems, of which both runs have the same in each resample: what
makes a problem hard for both cancels in the difference.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.evaluate import Interval, bootstrap, pass_at_k

MOST_KS = 256  # at which curves are compared to find where they cross


def paired_bootstrap(
    a_P: np.ndarray, b_P: np.ndarray, resamples: int, seed: int, level: float = 0.95
) -> Interval:
    """Returns the mean of b - a over problems, with its interval; both have one value a problem.

    Raises:
      ValueError: they are not of one length.
    """
    a_P, b_P = np.asarray(a_P, np.float64), np.asarray(b_P, np.float64)
    if a_P.shape != b_P.shape:
        raise ValueError("a paired bootstrap needs the same problems in both runs")
    return bootstrap(b_P - a_P, resamples, seed, level)


class Crossing(NamedTuple):
    """Where two curves of pass@k cross, which is more than that they meet.

    Attributes:
      above: "a" or "b", the one that solves more at k = 1; "" where both solve the same.
      k: where the other begins to, between whole numbers on a logarithmic scale; infinite where it
        does not up to the largest k.
      low, high: the interval around k, of resamples of the problems; 1 where the other is above
        from the start, infinite where the curves do not cross.
      share: of resamples in which they cross at some k > 1.
      largest: the largest k that was looked at.
    """

    above: str
    k: float
    low: float
    high: float
    share: float
    largest: int


def crossing(
    n_a: int,
    a_P: np.ndarray,
    n_b: int,
    b_P: np.ndarray,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Crossing:
    """Returns the k from which on the run that solves more at first does not (arXiv 2504.13837).

    Args:
      n_a, n_b: completions of each problem in run a and in run b.
      a_P, b_P: how many of them are correct.
      resamples, seed, level: as in `rl.evaluate.bootstrap`.
    """
    ks = spaced(min(n_a, n_b))
    a_PK = pass_at_k(n_a, np.asarray(a_P)[:, None], ks)
    b_PK = pass_at_k(n_b, np.asarray(b_P)[:, None], ks)
    ahead_PK = b_PK - a_PK
    mean_K = ahead_PK.mean(axis=0)
    sign = np.sign(round(float(mean_K[0]), 12))
    if not sign:
        return Crossing("", 1.0, 1.0, 1.0, 0.0, int(ks[-1]))
    count = len(ahead_PK)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    found = np.array([_first_crossing(ks, sign * ahead_PK[draw].mean(axis=0)) for draw in draws])
    bounds = [(1 - level) / 2, (1 + level) / 2]
    # Infinite places sort last, and nothing is interpolated between one and a finite one.
    low, high = np.quantile(found, bounds, method="closest_observation")
    share = float(np.mean((found > 1) & np.isfinite(found)))
    k = _first_crossing(ks, sign * mean_K)
    return Crossing("b" if sign > 0 else "a", k, float(low), float(high), share, int(ks[-1]))


def sampling_efficiency_gap(
    n_base: int,
    base_P: np.ndarray,
    n: int,
    correct_P: np.ndarray,
    k: int,
    resamples: int,
    seed: int,
) -> Interval:
    """Returns how far one completion of a run is from k of its base (arXiv 2504.13837).

        gap = pass@k(base) - pass@1(run)

    It is positive where the base solves more with k tries than the run with one, and then the
    smaller the better: the sign in which the paper reports it, with k = 256.

    Args:
      n_base, n: completions of each problem.
      base_P, correct_P: how many of them are correct.
      k: at most n_base.
    """
    return paired_bootstrap(
        pass_at_k(n, correct_P, 1), pass_at_k(n_base, base_P, k), resamples, seed
    )


def spaced(most: int) -> np.ndarray:
    """Returns whole numbers from 1 to `most`: all, or some that are evenly spaced in logarithm."""
    if most <= MOST_KS:
        return np.arange(1, most + 1)
    return np.unique(np.geomspace(1, most, MOST_KS).round().astype(int))


def powers_of_two(most: int) -> list[int]:
    """Returns 1, 2, 4, ... and `most`."""
    return [k for k in (2**i for i in range(most.bit_length())) if k < most] + [most]


def _first_crossing(ks: Sequence[int] | np.ndarray, ahead_K: np.ndarray) -> float:
    """Returns where a curve falls below 0; 1 if it begins there.

    That it comes to 0 is not enough: where two runs solve everything, their curves meet.
    """
    below_0 = np.flatnonzero(ahead_K < -1e-12)
    if not len(below_0):
        return math.inf
    place = int(below_0[0])
    if not place:
        return 1.0
    above, below = max(float(ahead_K[place - 1]), 0.0), float(ahead_K[place])
    first, last = math.log(ks[place - 1]), math.log(ks[place])
    return math.exp(first + (last - first) * above / (above - below))
