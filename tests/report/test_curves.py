"""Curves are true to their values, and axes have round ticks within their ends."""

import numpy as np
import pytest

from report.axes import Axis, axis_over
from report.curves import POINTS, smoothed


def test_running_mean_keeps_to_its_phase():
    """A jump between phases stays a jump, and a straight line a straight line: no lag, no smear."""
    y = np.concatenate([np.arange(50.0), 1000 + np.arange(50.0)])
    one = smoothed("", "blue", np.arange(1.0, 101), y, begins=[0, 50])
    np.testing.assert_allclose(one.y, y)


@pytest.mark.parametrize("count", [1, 2, 60, 61, 299, 301, 10_000])
def test_a_long_curve_keeps_its_ends_and_extremes(count):
    rng = np.random.default_rng(0)
    x, y = np.arange(float(count)), rng.normal(size=count)
    one = smoothed("", "blue", x, y, begins=[0.0])
    assert len(one.x) <= POINTS and (one.x[0], one.x[-1]) == (x[0], x[-1])
    np.testing.assert_array_equal(one.measured, y[one.x.astype(int)])
    if one.faint:
        assert len(one.faint[0]) <= 2 * POINTS
        assert (one.faint[1].min(), one.faint[1].max()) == (y.min(), y.max())
    else:
        np.testing.assert_array_equal(one.y, y)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_round_and_on_the_axis(seed, log):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-8, 9)
    values = rng.uniform(1e-3 if log else -1, 1, rng.integers(1, 9)) * scale
    axis = axis_over(values, 200, 10, log=log)
    ticks = axis.ticks()
    assert len(ticks) <= 14 and all(axis.low <= tick <= axis.high for tick in ticks)
    assert len(ticks) >= 2
    assert all(len(f"{abs(tick):.6e}".partition("e")[0].strip("0.")) <= 6 for tick in ticks)
    inside = axis.pixels(values)
    assert (inside <= 200).all() and (inside >= 10).all()


def test_a_constant_curve_and_a_zero_have_an_axis():
    for value in (0.0, 5.0, -5.0, 1e-20):
        for zero in (False, True):
            axis = axis_over(np.array([value]), 100, 0, from_zero=zero)
            assert axis.low < axis.high and np.isfinite(axis.pixels(np.array([value]))).all()


def test_pixels_of_a_log_axis():
    axis = Axis(1.0, 100.0, 0.0, 10.0, log=True)
    np.testing.assert_allclose(axis.pixels(np.array([1.0, 10.0, 100.0])), [0, 5, 10])
