"""An aggregation is a mean that depends neither on how the batch is cut nor on padding."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.aggregations import mean_of_sequence_means, sum_over, token_mean
from train.mean import Mean

AGGREGATIONS = {
    "mean_of_sequence_means": mean_of_sequence_means,
    "token_mean": token_mean,
    "sum_over": sum_over(8),
}
ROUNDING = 2e-6  # relative: float32 sums of some tens of numbers, in another order


def ragged_batch(rows: int = 6, width: int = 8):
    """Rows of lengths 1, 2, ...: a mean per microbatch differs from the global one by far more than
    rounding.
    """
    rng = np.random.default_rng(0)
    mask_BT = np.arange(width) < 1 + np.arange(rows)[:, None] % width
    return jnp.array(rng.normal(size=(rows, width)), jnp.float32), jnp.array(mask_BT)


def mean(aggregation, values_BT, mask_BT) -> Mean:
    return Mean(aggregation.total(values_BT, mask_BT), aggregation.weight(mask_BT))


def gradient(aggregation, values_BT, mask_BT):
    weight = aggregation.weight(mask_BT)
    return jax.grad(lambda values: aggregation.total(values, mask_BT) / weight)(values_BT)


@pytest.mark.parametrize(
    "name, expected",
    [
        # (1 + 2 + 3) / 3 and 10 / 1, over two sequences.
        ("mean_of_sequence_means", (2.0 + 10.0) / 2),
        ("token_mean", 16 / 4),
        ("sum_over", (6 / 8 + 10 / 8) / 2),
    ],
)
@pytest.mark.parametrize("dtype", [bool, jnp.float32, jnp.int32])
def test_by_hand(name, expected, dtype):
    values_BT = jnp.array([[1.0, 2.0, 3.0], [10.0, -5.0, 7.0], [4.0, 4.0, 4.0]])
    # The last row only fills the batch.
    mask_BT = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype)
    found = mean(AGGREGATIONS[name], values_BT, mask_BT).value
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_gradient_does_not_depend_on_microbatches(name, microbatches):
    aggregation, (values_BT, mask_BT) = AGGREGATIONS[name], ragged_batch()
    weight = aggregation.weight(mask_BT)
    cut = [jnp.split(x, microbatches) for x in (values_BT, mask_BT)]
    gradients = [
        jax.grad(lambda values, mask=mask: aggregation.total(values, mask) / weight)(values)
        for values, mask in zip(*cut, strict=True)
    ]
    chex.assert_trees_all_close(
        jnp.concatenate(gradients), gradient(aggregation, values_BT, mask_BT), rtol=ROUNDING
    )
    means = (mean(aggregation, values, mask) for values, mask in zip(*cut, strict=True))
    added = functools.reduce(operator.add, means)
    chex.assert_trees_all_close(added, mean(aggregation, values_BT, mask_BT), rtol=ROUNDING)


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("junk", [0.0, 1e30, jnp.nan])
@pytest.mark.parametrize("dtype", [bool, jnp.float32])
def test_padding_counts_for_nothing(name, junk, dtype):
    """Wider rows, and whole rows without a completion token, whatever stands in them: same value,
    same gradient, and none on the padding.

    Both kinds of mask: jnp multiplies NaN by False to 0, but NaN by 0.0 to NaN.
    """
    aggregation, (values_BT, mask_BT) = AGGREGATIONS[name], ragged_batch()
    mask_BT = mask_BT.astype(dtype)
    padded_BT = jnp.pad(
        jnp.where(mask_BT > 0, values_BT, junk), ((0, 2), (3, 5)), constant_values=junk
    )
    padded_mask_BT = jnp.pad(mask_BT, ((0, 2), (3, 5)))
    chex.assert_trees_all_close(
        mean(aggregation, padded_BT, padded_mask_BT),
        mean(aggregation, values_BT, mask_BT),
        rtol=ROUNDING,
    )
    expected_BT = jnp.pad(gradient(aggregation, values_BT, mask_BT), ((0, 2), (3, 5)))
    chex.assert_trees_all_close(
        gradient(aggregation, padded_BT, padded_mask_BT), expected_BT, rtol=ROUNDING
    )


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_batch_without_completion_tokens_is_zero(name):
    values_BT, mask_BT = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    nothing = mean(AGGREGATIONS[name], values_BT, mask_BT)
    assert nothing.value == 0 and nothing.weight == 0
    slope_BT = jax.grad(lambda values: mean(AGGREGATIONS[name], values, mask_BT).value)(values_BT)
    chex.assert_trees_all_equal(slope_BT, jnp.zeros((2, 3)))


def test_length_bias():
    """The gradient of one token under 1/|o| shrinks with the length of its completion.

    Under Dr.GRPO's constant divisor it does not.
    """
    values_BT, mask_BT = ragged_batch(rows=4)
    per_length = gradient(mean_of_sequence_means, values_BT, mask_BT)[:, 0]
    np.testing.assert_allclose(per_length, 1 / (4 * np.array([1, 2, 3, 4])), rtol=ROUNDING)
    np.testing.assert_allclose(
        gradient(sum_over(8), values_BT, mask_BT)[:, 0], np.full(4, 1 / (4 * 8)), rtol=ROUNDING
    )


def test_sums_are_float32():
    """257 ones: the first count that bfloat16 does not have."""
    values_BT, mask_BT = jnp.ones((1, 257), jnp.bfloat16), jnp.ones((1, 257), jnp.bfloat16)
    assert float(token_mean.total(values_BT, mask_BT)) == float(token_mean.weight(mask_BT)) == 257
