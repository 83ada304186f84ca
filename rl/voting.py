"""cons@k: how often the majority answer among k completions of a problem is right."""

from collections.abc import Sequence

import numpy as np

from rl.evaluate import Interval, bootstrap

TIES = ("share", "first")
NO_ANSWER = -1
NEGLIGIBLE = 1e-18  # a chance; of n completions fewer than n ** 2 such are left out


def cons_at_k(classes_G: np.ndarray, correct_G: np.ndarray, k: int, ties: str = "share") -> float:
    """Returns the chance that the majority answer of k of a problem's completions is right.

    The k are drawn without replacement, so that the estimate is unbiased as that of pass@k is
    (self-consistency, arXiv 2203.11171; cons@64 of DeepSeek-R1, arXiv 2501.12948). It is exact: no
    draws are simulated. A completion without an answer has no vote, and where none of the k has
    one, the majority is wrong. A class whose completions are not all right, as a reward of one's
    own may have it, is right by the share of them that are.

    Args:
      classes_G: int, the answer of each completion as a number; NO_ANSWER where it has none.
      correct_G: 0 and 1, or bool, whether each completion is a success.
      k: completions that vote, at most G.
      ties: what becomes of answers with equally many votes. "share": each is the majority equally
        often, so that two of which one is right pay 1/2. "first": the one whose first drawn
        completion was sampled first, as libraries have it that count in order.

    Raises:
      ValueError: unless 1 <= k <= G, with one class and one success a completion.
    """
    classes_G, correct_G = np.asarray(classes_G), np.asarray(correct_G, np.float64)
    if classes_G.shape != correct_G.shape or classes_G.ndim != 1:
        raise ValueError("cons@k needs one class and one success for each completion")
    if not 1 <= k <= len(classes_G):
        raise ValueError("cons@k needs 1 <= k <= n")
    if ties not in TIES:
        raise ValueError(f"ties = {ties!r}: must be one of {', '.join(TIES)}")
    names = np.unique(classes_G[classes_G != NO_ANSWER])
    value_J = np.array([correct_G[classes_G == name].mean() for name in names])
    places = [np.flatnonzero(classes_G == name) for name in names]
    if not value_J.any():
        return 0.0
    if k == len(classes_G):
        return _vote_of_all(places, value_J, ties)
    chance = _chance_by_first if ties == "first" else _chance_by_share
    draw = _Draw(len(classes_G), k)
    wins = [chance(draw, places, j) * value for j, value in enumerate(value_J) if value]
    return float(np.clip(sum(wins), 0.0, 1.0))


def cons_at_k_table(
    classes_PG: Sequence[np.ndarray],
    correct_PG: Sequence[np.ndarray],
    ks: Sequence[int],
    resamples: int,
    seed: int,
    ties: str = "share",
) -> dict[int, Interval]:
    """Returns cons@k for each k, averaged over P problems, with its bootstrap interval."""
    return {
        k: bootstrap(
            np.array(
                [
                    cons_at_k(classes_G, correct_G, k, ties)
                    for classes_G, correct_G in zip(classes_PG, correct_PG, strict=True)
                ]
            ),
            resamples,
            seed,
        )
        for k in ks
    }


def _vote_of_all(places: Sequence[np.ndarray], value_J: np.ndarray, ties: str) -> float:
    most = max(map(len, places))
    tied = [j for j, place in enumerate(places) if len(place) == most]
    if ties == "first":
        return float(value_J[min(tied, key=lambda j: places[j][0])])
    return float(value_J[tied].mean())


class _Draw:
    """A draw of k of n without replacement, as n coins of p = k / n that are k heads in all.

    Votes of a class of u completions are then Binomial(u, p), independent of the others but for the
    sum. What is summed over draws is a coefficient of a product of polynomials in z, one a class,
    and is read off at the n + 1 roots of unity z_F. All terms are probabilities, at most 1, and
    the chance of k heads in all is about (2 pi n p (1 - p)) ** -0.5: nothing overflows or cancels.
    """

    def __init__(self, n: int, k: int):
        self.n, self.k, self.p = n, k, k / n
        self._log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
        F = (n + 1) // 2 + 1
        self.z_F = np.exp(2j * np.pi * np.arange(F) / (n + 1))
        # The other half of the roots are the conjugates of these.
        twice_F = np.full(F, 2.0)
        twice_F[0] = 1.0
        if (n + 1) % 2 == 0:
            twice_F[-1] = 1.0
        self._weight_F = twice_F * self.z_F**-k / ((n + 1) * self.heads(n, k))

    def heads(self, of: int | np.ndarray, count: int | np.ndarray, among=None) -> np.ndarray:
        """Returns the chance that `count` of so many coins are heads, 0 where there are fewer.

        With `among`, that these heads are all among so many of the coins.
        """
        of, count = np.asarray(of), np.asarray(count)
        among = of if among is None else np.asarray(among)
        possible = count <= among
        rest = np.where(possible, among - count, 0)
        log = self._log_factorial
        ways = log[among] - log[np.where(possible, count, 0)] - log[rest]
        logs = ways + count * np.log(self.p) + (of - count) * np.log1p(-self.p)
        return np.exp(np.where(possible, logs, -np.inf))

    def chance(self, product_F: np.ndarray) -> float:
        """Returns the coefficient of z^k, given that k are heads."""
        return float(np.sum(self._weight_F * product_F).real)

    def without_votes(self, count: int) -> np.ndarray:
        """Returns the polynomial of coins that have no vote."""
        return (1 - self.p + self.p * self.z_F) ** count


def _chance_by_share(draw: _Draw, places: Sequence[np.ndarray], j: int) -> float:
    """Returns the chance that class j is the majority, a tie with t others counting 1 / (t + 1).

    1 / (t + 1) is the integral of y^t over [0, 1], so a factor y marks each tied class, and the
    integral over y is a Gauss-Legendre sum, exact for the t that there can be.
    """
    own, none = len(places[j]), draw.n - sum(map(len, places))
    sizes = np.array([len(place) for other, place in enumerate(places) if other != j], int)
    size_U, times_U = np.unique(sizes, return_counts=True)
    fewer_UF = np.zeros((len(size_U), len(draw.z_F)), complex)
    silent_F, total = draw.without_votes(none), 0.0
    for m in range(1, min(own, draw.k) + 1):
        fewer_UF += draw.heads(size_U, m - 1)[:, None] * draw.z_F ** (m - 1)
        equal_UF = draw.heads(size_U, m)[:, None] * draw.z_F**m
        most_tied = min(int(np.sum(sizes >= m)), draw.k // m - 1)
        nodes, weights = np.polynomial.legendre.leggauss(most_tied // 2 + 1)
        others_F = np.zeros_like(draw.z_F)
        for y, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            others_F += weight * np.prod((fewer_UF + y * equal_UF) ** times_U[:, None], axis=0)
        total += draw.chance(draw.heads(own, m) * draw.z_F**m * silent_F * others_F)
    return total


def _chance_by_first(draw: _Draw, places: Sequence[np.ndarray], j: int) -> float:
    """Returns the chance that class j is the majority, of tied classes the one drawn first.

    Completions are drawn in the order in which they were sampled: the first of class j that is
    drawn stands at some place, and a class that ties must have all of its votes behind that.
    """
    own, others = places[j], [place for other, place in enumerate(places) if other != j]
    silent_F, total = draw.without_votes(draw.n - sum(map(len, places))), 0.0
    size_J = np.array([len(place) for place in others], int)
    fewer_JF = np.zeros((len(others), len(draw.z_F)), complex)
    for m in range(1, min(len(own), draw.k) + 1):
        fewer_JF += draw.heads(size_J, m - 1)[:, None] * draw.z_F ** (m - 1)
        small = size_J < m
        settled_F = silent_F * draw.z_F**m * np.prod(fewer_JF[small], axis=0)
        large = np.flatnonzero(~small)
        for i, place in enumerate(own[: len(own) - m + 1]):
            # It is drawn, the i before it are not, and m - 1 of those behind it are.
            here = draw.p * draw.heads(len(own) - 1, m - 1, among=len(own) - i - 1)
            if here < NEGLIGIBLE:
                continue
            after_J = np.array([np.sum(others[other] > place) for other in large], int)
            equal_J = draw.heads(size_J[large], m, among=after_J)
            tied_JF = fewer_JF[large] + equal_J[:, None] * draw.z_F**m
            total += float(here) * draw.chance(settled_F * np.prod(tied_JF, axis=0))
    return total
