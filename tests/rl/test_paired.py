"""Two runs on the same problems: differences, crossings and the gap to a base."""

import math

import numpy as np
import pytest

from data.tasks.problem import Problem
from rl.difficulty import by_own_difficulty, by_pass_rate, difficulty_of
from rl.evaluate import bootstrap, pass_at_k
from rl.paired import (
    crossing,
    paired_bootstrap,
    powers_of_two,
    sampling_efficiency_gap,
    spaced,
)


def test_what_makes_a_problem_hard_for_both_cancels():
    """Two runs apart by about 0.1 on problems that differ far more: the paired interval is far
    narrower than that of either run, and has no 0 in it.
    """
    rng = np.random.default_rng(0)
    a_P = rng.uniform(size=200)
    b_P = a_P + 0.1 + 0.02 * rng.normal(size=200)
    difference = paired_bootstrap(a_P, b_P, 500, seed=0)
    alone = bootstrap(a_P, 500, seed=0)
    assert difference.low < 0.1 < difference.high and difference.low > 0.09
    assert difference.high - difference.low < (alone.high - alone.low) / 5
    assert paired_bootstrap(b_P, a_P, 500, seed=0).mean == pytest.approx(-difference.mean)


def test_other_problems_are_refused():
    with pytest.raises(ValueError, match="the same problems"):
        paired_bootstrap(np.zeros(3), np.zeros(4), 10, seed=0)


def test_intervals_cover_the_difference_of_the_population():
    """95 % intervals of 60 problems: of 300 draws 95 % +- 3 standard errors of 1.3 % cover, with
    2 % less for the bootstrap's own bias with so few problems.
    """
    rng, covered = np.random.default_rng(1), 0
    for seed in range(300):
        a_P = rng.uniform(size=60)
        b_P = np.clip(a_P + 0.05 + 0.2 * rng.normal(size=60), -9, 9)
        found = paired_bootstrap(a_P, b_P, 200, seed)
        covered += found.low <= 0.05 <= found.high
    assert 0.89 <= covered / 300 <= 0.99


def test_curves_cross_where_the_means_do():
    """Run b solves half of the problems always, run a each at times: b is above at first."""
    n, count = 64, 40
    a_P = np.full(count, 16)
    b_P = np.where(np.arange(count) % 2, n, 0)
    found = crossing(n, a_P, n, b_P, 300, seed=0)
    ks = np.arange(1, n + 1)
    below = ks[pass_at_k(n, 16, ks) >= 0.5][0]
    assert found.above == "b" and below - 1 < found.k <= below
    assert found.low <= found.k <= found.high and found.share > 0.9 and found.largest == n
    other = crossing(n, b_P, n, a_P, 300, seed=0)
    assert other.above == "a" and other.k == pytest.approx(found.k)


def test_curves_that_do_not_cross_have_no_finite_place():
    n = 16
    found = crossing(n, np.array([1, 2, 3, 0]), n, np.array([9, 12, 10, 4]), 200, seed=0)
    assert found.above == "b" and math.isinf(found.k) and math.isinf(found.high)
    assert found.share == 0
    same = crossing(n, np.array([3, 4]), n, np.array([3, 4]), 50, seed=0)
    assert same.above == "" and same.share == 0


def test_runs_may_have_other_numbers_of_completions():
    found = crossing(8, np.array([4, 4]), 32, np.array([32, 0]), 100, seed=0)
    assert found.largest == 8


def test_the_gap_is_positive_where_the_base_has_more_in_many_tries():
    """pass@4 of the base by hand: C(2, 4) = 0, and C(6, 4) / C(8, 4) = 15 / 70."""
    base_P, run_P = np.array([6, 2]), np.array([8, 0])
    expected = (1 + (1 - 15 / 70)) / 2 - (1 + 0) / 2
    gap = sampling_efficiency_gap(8, base_P, 8, run_P, 4, 100, seed=0)
    assert gap.mean == pytest.approx(expected) and gap.mean > 0


def test_ks_are_whole_numbers_up_to_the_last():
    assert powers_of_two(1) == [1] and powers_of_two(12) == [1, 2, 4, 8, 12]
    assert powers_of_two(1024)[-2:] == [512, 1024]
    many = spaced(100_000)
    assert many[0] == 1 and many[-1] == 100_000 and len(many) <= 256
    assert spaced(7).tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "data, ops, expected",
    [
        ({"difficulty": 3}, 2, 3),
        ({"level": "Level 5"}, 2, "Level 5"),
        ({"difficulty": [1]}, 0, None),
        ({}, 2, 2),
        ({}, 0, None),
    ],
)
def test_a_problem_says_how_hard_it_is(data, ops, expected):
    assert difficulty_of(Problem("q", "a", ops=ops, data=data)) == expected


def test_difficulties_are_groups_by_name_value_or_quarter():
    named = by_own_difficulty(["hard", "easy", None, "easy"])
    assert [(g.name, g.places.tolist()) for g in named] == [("easy", [1, 3]), ("hard", [0])]
    valued = by_own_difficulty([2, 3, 2, None])
    assert [(g.name, g.places.tolist()) for g in valued] == [("2", [0, 2]), ("3", [1])]
    many = by_own_difficulty([float(x) for x in range(100)])
    assert [len(g.places) for g in many] == [25, 25, 25, 25]
    assert sorted(np.concatenate([g.places for g in many])) == list(range(100))
    assert by_own_difficulty([None, None]) == []


def test_pass_rates_are_groups_with_never_and_always():
    rates = np.array([0, 0.1, 0.25, 0.3, 0.9, 1])
    groups = {g.name: g.places.tolist() for g in by_pass_rate(rates)}
    assert groups == {
        "never": [0],
        "0% to 25%": [1, 2],
        "25% to 50%": [3],
        "75% to 100%": [4],
        "always": [5],
    }
