"""pass@k is exact and unbiased; its interval is a bootstrap over problems."""

import math
from fractions import Fraction

import numpy as np
import pytest

from rl.evaluate import bootstrap, pass_at_k, pass_at_k_table, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_pass_at_k_is_exact(n):
    """Against binomials in rational arithmetic, for every c and k. At most n products of factors
    below 1, each one rounding of 1.1e-16.
    """
    cs, ks = range(n + 1), range(1, n + 1)
    expected = [[float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for k in ks] for c in cs]
    np.testing.assert_allclose(
        pass_at_k(n, np.array(cs)[:, None], np.array(ks)), expected, rtol=0, atol=2 * n * 1.1e-16
    )


def test_pass_at_k_of_many_samples_does_not_overflow():
    """C(5000, 2000) has 1,460 digits."""
    expected = float(1 - Fraction(math.comb(4998, 2000), math.comb(5000, 2000)))
    # 2,000 roundings of 1.1e-16, and room.
    assert float(pass_at_k(5000, 2, 2000)) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_rises_with_k_and_pass_at_1_is_the_mean():
    curve = pass_at_k(16, 3, np.arange(1, 17))
    assert (np.diff(curve[:14]) > 0).all()
    assert (curve[13:] == 1).all(), "14 draws among 13 wrong ones cannot all be wrong"
    assert curve[0] == pytest.approx(3 / 16, abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over c ~ Binomial(n, p) is 1 - (1 - p)^k, exactly; the plug-in 1 - (1 - c/n)^k is
    not.
    """
    n, k, p = 8, 4, 0.3
    c = np.arange(n + 1)
    chance = np.array([math.comb(n, int(x)) * p**x * (1 - p) ** (n - x) for x in c])
    assert chance @ pass_at_k(n, c, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)
    assert abs(chance @ (1 - (1 - c / n) ** k) - (1 - (1 - p) ** k)) > 0.01


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(n, c, k)


def test_greedy_is_flat_in_k():
    correct_PG = np.repeat([[True], [False], [True]], 8, axis=1)
    table = pass_at_k_table(correct_PG, (1, 2, 4, 8), resamples=100, seed=0)
    assert len(set(table.values())) == 1 and table[1].mean == pytest.approx(2 / 3)


def test_table_averages_over_problems():
    correct_PG = np.array([[1, 0, 0, 0], [1, 1, 1, 1]])
    table = pass_at_k_table(correct_PG, (1, 4), resamples=10, seed=0)
    assert table[1].mean == pytest.approx((1 / 4 + 1) / 2) and table[4].mean == 1


def test_bootstrap_is_repeatable_and_orders_its_bounds():
    values = np.random.default_rng(0).uniform(size=50)
    first, again, other = (bootstrap(values, 500, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.low < first.mean < first.high and first.mean == pytest.approx(values.mean())


def test_bootstrap_width_is_the_standard_error():
    """For 400 problems the ends are nearly mean +- z s / sqrt(P), z = 1.96 for 95 % and 0.674 for
    50 %; 10,000 resamples find them to 0.03 s / sqrt(P).
    """
    values = np.random.default_rng(0).normal(size=400)
    error = values.std() / 20
    for level, z in ((0.95, 1.960), (0.5, 0.674)):
        interval = bootstrap(values, 10_000, 0, level)
        assert interval.high - interval.mean == pytest.approx(z * error, abs=0.1 * error)
        assert interval.mean - interval.low == pytest.approx(z * error, abs=0.1 * error)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap(np.ones(20), 50, 0) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [[1.0, 0.0]]])
def test_bootstrap_wants_one_value_per_problem(values):
    with pytest.raises(ValueError, match="one value per problem"):
        bootstrap(np.array(values), 10, 0)


def test_the_interval_of_one_problem_is_where_the_score_test_does_not_refuse():
    """At its ends the observed share is z standard errors of that share away, but for 0 and 1."""
    z = 1.959964
    for n in (1, 8, 256):
        for c in {0, 1, n // 3, n}:
            for end in wilson(c, n):
                assert 0 <= end <= 1
                if 0 < end < 1:
                    error = math.sqrt(end * (1 - end) / n)
                    assert abs(c / n - end) == pytest.approx(z * error, rel=1e-9)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[0] == pytest.approx(1 - 0.2775, abs=1e-4)
