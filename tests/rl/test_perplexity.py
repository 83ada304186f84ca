"""Perplexities of completions, by hand and under a model."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rl.perplexity import (
    Written,
    distribution,
    first_of_each,
    log_by_problem,
    perplexities,
    perplexity,
    rank_among,
)


def test_it_is_the_inverse_of_the_geometric_mean():
    assert perplexity(np.log([0.5, 0.125])) == pytest.approx(4.0)
    assert perplexity(np.zeros(3)) == 1.0
    assert math.isfinite(perplexity(np.full(2, -1e9)))


def test_of_a_row_only_the_completion_counts():
    """A model that gives every token but the first the logarithm -id."""
    asked = []

    def logprobs(rows):
        asked.extend(rows)
        return [-np.asarray(row[1:], float) for row in rows]

    scorer = cast(Any, SimpleNamespace(logprobs=logprobs))
    written = [Written("p", [9, 9, 9], [1, 2], ""), Written("p", [9], [3], "")]
    assert perplexities(scorer, written) == pytest.approx(np.exp([1.5, 3.0]))
    assert asked == [[9, 9, 9, 1, 2], [9, 3]]


def test_problems_count_alike_however_many_completions_they_have():
    written = [Written("a", [1], [2], "")] * 3 + [Written("b", [1], [2], "")]
    perplexity_N = np.exp([1.0, 1.0, 1.0, 3.0])
    assert log_by_problem(written, perplexity_N) == pytest.approx({"a": 1.0, "b": 3.0})
    found = distribution(written, perplexity_N, resamples=50)
    assert found["log_perplexity"]["mean"] == pytest.approx(2.0)
    assert found["completions"] == 4 and found["problems"] == 2
    assert found["quantiles"]["0.5"] == pytest.approx(math.e)


def test_the_first_completions_of_each_problem_are_taken():
    written = [
        Written(p, [1], ids, "") for p, ids in (("a", [1]), ("b", [2]), ("a", []), ("a", [3]))
    ]
    assert [one.tokens for one in first_of_each(written, 2)] == [[1], [2]]


def test_a_rank_is_a_half_of_what_is_alike_and_one_of_what_is_likelier():
    """Against all pairs."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(1, 6, 40).astype(float), rng.integers(1, 6, 30).astype(float)
    pairs = np.mean([(b > a) + (a == b) / 2 for a in one for b in other])
    assert rank_among(one, other) == pytest.approx(pairs)
    assert rank_among(one, one) == pytest.approx(0.5)
    assert rank_among(np.ones(3), np.full(4, 2.0)) == 1.0
