"""Weights and rejections for a sampler that is not quite the trainer."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.corrections import REJECTIONS, correction, within
from rl.algorithms.sequences import Sequences

# Two sequences in the first row, one in the second; a token in between is not learnt from.
NUMBERS = jnp.array([[1, 1, 0, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
LOG = jnp.array([[0.1, -0.3, 9.0, 0.25, 0.5, -0.05], [-0.4, 0.05, 0.35, -0.1, 9.0, 9.0]])
SEQUENCES = Sequences(NUMBERS, jnp.array([2, 1]))
MASK = np.asarray(NUMBERS > 0)
LOG_MASKED = jnp.where(NUMBERS > 0, LOG, 0.0)
ROUNDING = 1e-6


def test_the_recorded_weights():
    """verl's, with a cap of 1.2 on each token, or on the product over a completion."""
    log = jnp.array([[0.1, -0.3, 0.25, 0.5], [-0.4, 0.05, 0.35, 0.0], [0.6, -0.2, 0.0, 0.0]])
    numbers = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    given = log, Sequences(numbers, jnp.ones(3, jnp.int32))
    token = correction("token_truncate", *given, 0.0, 1.2, False)
    expected = [[1.10517, 0.74082, 1.2, 1.2], [0.67032, 1.05127, 1.2], [1.2, 0.81873]]
    for row, values in enumerate(expected):
        np.testing.assert_allclose(token[row, : len(values)], values, atol=1e-5)
    whole = correction("sequence_truncate", *given, 0.0, 1.2, False)
    np.testing.assert_allclose(whole[:, 0], [1.2, 1.0, 1.2], atol=ROUNDING)


def test_what_is_out_of_bounds_is_masked_and_what_is_inside_keeps_its_weight():
    found = correction("token_mask", LOG_MASKED, SEQUENCES, 0.8, 1.3, False)
    raw = np.exp(np.asarray(LOG))
    expected = np.where((raw >= 0.8) & (raw <= 1.3), raw, 0.0)
    np.testing.assert_allclose(np.asarray(found)[MASK], expected[MASK], rtol=ROUNDING)
    assert 0 < np.mean(expected[MASK] == 0) < 1
    whole = correction("sequence_mask", LOG_MASKED, SEQUENCES, 0.0, 1.5, False)
    # Sums of logs: -0.2, 0.7 (above log 1.5) and -0.1.
    np.testing.assert_allclose(whole[0], [np.exp(-0.2)] * 2 + [1] + [0] * 3, rtol=ROUNDING)
    np.testing.assert_allclose(whole[1, :4], [np.exp(-0.1)] * 4, rtol=ROUNDING)


def test_geometric_weights_are_of_the_mean_over_a_completion():
    """Sums of logs over lengths: -0.1, 0.7 / 3 (above log 1.2) and -0.025."""
    given = LOG_MASKED, SEQUENCES, 0.95, 1.2, False
    whole = np.asarray(correction("geometric_truncate", *given))
    np.testing.assert_allclose(whole[[0, 0, 1], [0, 3, 0]], [0.95, 1.2, np.exp(-0.025)], rtol=1e-6)
    masked = np.asarray(correction("geometric_mask", *given))
    np.testing.assert_allclose(masked[[0, 0, 1], [0, 3, 0]], [0, 0, np.exp(-0.025)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate"])
def test_weights_of_mean_one(kind):
    """Over tokens, or over completions, whatever their lengths."""
    found = np.asarray(correction(kind, LOG_MASKED, SEQUENCES, 0.0, 1.2, True))
    if kind == "token_truncate":
        assert found[MASK].mean() == pytest.approx(1, abs=ROUNDING)
    else:
        assert found[[0, 0, 1], [0, 3, 0]].mean() == pytest.approx(1, abs=ROUNDING)


@pytest.mark.parametrize("kind", REJECTIONS)
def test_rejections_by_a_loop(kind):
    low, high = (0.6 if "all" in kind else 0.9, 1.45 if "all" in kind else 1.25)
    low, high = (low, high) if kind.endswith("k1") else (0.0, 0.1 if "sum" in kind else 0.05)
    found = np.asarray(within(kind, LOG_MASKED, SEQUENCES, low, high))
    over, _, estimate = kind.rpartition("_")
    reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}.get(over.removeprefix("sequence_"))
    kept = []
    for row, number in ((0, 1), (0, 2), (1, 1)):
        log = np.asarray(LOG, np.float64)[row][np.asarray(NUMBERS)[row] == number]
        value = {"k1": log, "k2": log**2 / 2, "k3": np.exp(log) - 1 - log}[estimate]
        value = value if reduce is None else np.full(len(log), reduce(value))
        if over == "sequence_all":
            whole = np.all((value >= np.log(low)) & (value <= np.log(high)))
            value = np.full(len(log), 0.0 if whole else np.inf)
        inside = (value >= np.log(low)) & (value <= np.log(high)) if estimate == "k1" else (
            value <= high
        )  # fmt: skip
        np.testing.assert_array_equal(found[row][np.asarray(NUMBERS)[row] == number], inside)
        kept += inside.tolist()
    assert 0 < np.mean(kept) < 1
