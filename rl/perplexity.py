"""How likely one model finds what another wrote (arXiv 2504.13837)."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl.evaluate import Interval, bootstrap
from rl.scoring import Scorer

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Written(NamedTuple):
    """A completion: the id of its problem, the prompt's ids, its own ids and its text."""

    problem: str
    prompt: Sequence[int]
    tokens: Sequence[int]
    text: str


def perplexity(logprobs_T: np.ndarray) -> float:
    """Returns PPL(Y | x) = exp(-(1 / T) sum_t log P(y_t | x, y_<t)) of one completion.

    Args:
      logprobs_T: natural logarithms, of the tokens of the completion alone, its stop token too.
    """
    mean = float(np.mean(np.asarray(logprobs_T, np.float64)))
    return float(np.exp(min(-mean, 700.0)))


def perplexities(scorer: Scorer, written: Sequence[Written]) -> np.ndarray:
    """Returns the perplexity of each completion under a model, at temperature 1."""
    rows = [[*one.prompt, *one.tokens] for one in written]
    logprobs = scorer.logprobs(rows)
    return np.array(
        [
            perplexity(logprobs_T[len(logprobs_T) - len(one.tokens) :])
            for one, logprobs_T in zip(written, logprobs, strict=True)
        ]
    )


def first_of_each(written: Iterable[Written], most: int) -> list[Written]:
    """Returns the first completions of each problem, at most so many, without the empty ones."""
    counts: dict[str, int] = {}
    kept = []
    for one in written:
        counts[one.problem] = counts.get(one.problem, 0) + 1
        if counts[one.problem] <= most and len(one.tokens):
            kept.append(one)
    return kept


def distribution(
    written: Sequence[Written], perplexity_N: np.ndarray, resamples: int
) -> dict[str, Any]:
    """Returns quantiles of the perplexities of completions, and the mean of their logarithms.

    "log_perplexity" is a mean over problems of the mean over completions, in nats a token, with its
    bootstrap interval over problems: perplexities have long tails, and their mean is of few.
    """
    by_problem = log_by_problem(written, perplexity_N)
    interval: Interval = bootstrap(np.array(list(by_problem.values())), resamples, seed=0)
    return {
        "completions": len(written),
        "problems": len(by_problem),
        "quantiles": {
            f"{q:g}": float(value)
            for q, value in zip(QUANTILES, np.quantile(perplexity_N, QUANTILES), strict=True)
        },
        "log_perplexity": {name: float(x) for name, x in interval._asdict().items()},
    }


def log_by_problem(written: Sequence[Written], perplexity_N: np.ndarray) -> dict[str, float]:
    """Returns problem -> the mean logarithm of its completions' perplexities."""
    pairs = sorted(
        zip((one.problem for one in written), np.log(perplexity_N).tolist(), strict=True)
    )
    return {
        problem: float(np.mean([value for _, value in some]))
        for problem, some in itertools.groupby(pairs, key=lambda pair: pair[0])
    }


def rank_among(perplexity_N: np.ndarray, others_M: np.ndarray) -> float:
    """Returns the share of other completions that are less likely, a tie counting half.

    It is 1/2 where both are of one distribution, and near 1 where the first lie in the low part of
    the others, as what a reinforced model writes does under its base.
    """
    ordered = np.sort(others_M)
    above = len(ordered) - np.searchsorted(ordered, perplexity_N, side="right")
    equal = np.searchsorted(ordered, perplexity_N, side="right") - np.searchsorted(
        ordered, perplexity_N, side="left"
    )
    return float(np.mean(above + equal / 2) / len(ordered))
