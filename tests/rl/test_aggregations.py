"""An aggregation is a mean that depends neither on how the batch is cut nor on padding."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.aggregations import constant, prompt_mean, sequence_mean, token_mean, token_sum
from rl.algorithms.sequences import Sequences
from train.mean import Mean

AGGREGATIONS = {
    "sequence_mean": sequence_mean(),
    "token_mean": token_mean(),
    "constant": constant(divisor=8),
    "token_sum": token_sum(),
    "prompt_mean": prompt_mean(),
}
GROUP_TOKENS = 6.0  # of each prompt, in the step
ROUNDING = 2e-6  # relative: float32 sums of some tens of numbers, in another order


def ragged_batch(rows: int = 6, width: int = 8):
    """Rows of lengths 1, 2, ...: a mean per microbatch differs from the global one by far more than
    rounding.
    """
    rng = np.random.default_rng(0)
    mask_BT = np.arange(width) < 1 + np.arange(rows)[:, None] % width
    return jnp.array(rng.normal(size=(rows, width)), jnp.float32), jnp.array(mask_BT)


def sequences(mask_BT) -> Sequences:
    """Each row a sequence, of prompts of which the step has 6 tokens each."""
    group_tokens_BT = jnp.where(mask_BT > 0, GROUP_TOKENS, 0.0)
    return Sequences(mask_BT, jnp.ones(mask_BT.shape[0], jnp.int32), group_tokens_BT)


def mean(aggregation, values_BT, mask_BT) -> Mean:
    where = sequences(mask_BT)
    return Mean(aggregation.total(values_BT, where), aggregation.weight(where))


def gradient(aggregation, values_BT, mask_BT):
    where = sequences(mask_BT)
    weight = aggregation.weight(where)
    return jax.grad(lambda values: aggregation.total(values, where) / weight)(values_BT)


@pytest.mark.parametrize(
    "name, expected",
    [
        # (1 + 2 + 3) / 3 and 10 / 1, over two sequences.
        ("sequence_mean", (2.0 + 10.0) / 2),
        ("token_mean", 16 / 4),
        ("constant", (6 / 8 + 10 / 8) / 2),
        ("token_sum", 16),
        # Four of the tokens of a prompt are two thirds of it.
        ("prompt_mean", (16 / 6) / (4 / 6)),
    ],
)
@pytest.mark.parametrize("dtype", [bool, jnp.int32])
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
    weight = aggregation.weight(sequences(mask_BT))
    cut = [jnp.split(x, microbatches) for x in (values_BT, mask_BT)]
    gradients = [
        jax.grad(lambda x, mask=mask: aggregation.total(x, sequences(mask)) / weight)(values)
        for values, mask in zip(*cut, strict=True)
    ]
    chex.assert_trees_all_close(
        jnp.concatenate(gradients), gradient(aggregation, values_BT, mask_BT), rtol=ROUNDING
    )
    means = (mean(aggregation, values, mask) for values, mask in zip(*cut, strict=True))
    added, whole = functools.reduce(operator.add, means), mean(aggregation, values_BT, mask_BT)
    chex.assert_trees_all_close(added.total, whole.total, rtol=ROUNDING)
    if name != "token_sum":  # whose weight is 1, however it is cut
        chex.assert_trees_all_close(added.weight, whole.weight, rtol=ROUNDING)


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("junk", [0.0, 1e30, jnp.nan])
def test_padding_counts_for_nothing(name, junk):
    """Wider rows, and whole rows without a completion token, whatever stands in them: same value,
    same gradient, and none on the padding.
    """
    aggregation, (values_BT, mask_BT) = AGGREGATIONS[name], ragged_batch()
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
    assert nothing.value == 0 and nothing.weight == (1 if name == "token_sum" else 0)
    slope_BT = jax.grad(lambda values: mean(AGGREGATIONS[name], values, mask_BT).value)(values_BT)
    chex.assert_trees_all_equal(slope_BT, jnp.zeros((2, 3)))


def test_length_bias():
    """The gradient of one token under 1/|o| shrinks with the length of its completion.

    Under Dr.GRPO's constant divisor it does not.
    """
    values_BT, mask_BT = ragged_batch(rows=4)
    per_length = gradient(sequence_mean(), values_BT, mask_BT)[:, 0]
    np.testing.assert_allclose(per_length, 1 / (4 * np.array([1, 2, 3, 4])), rtol=ROUNDING)
    np.testing.assert_allclose(
        gradient(constant(divisor=8), values_BT, mask_BT)[:, 0],
        np.full(4, 1 / (4 * 8)),
        rtol=ROUNDING,
    )


def test_sums_are_float32():
    """257 ones: the first count that bfloat16 does not have."""
    values_BT, mask_BT = jnp.ones((1, 257), jnp.bfloat16), jnp.ones((1, 257), bool)
    found = mean(token_mean(), values_BT, mask_BT)
    assert float(found.total) == float(found.weight) == 257


@pytest.mark.parametrize("build", [sequence_mean, constant])
def test_completions_of_which_nothing_is_learnt_count_on_request(build):
    """Two rows of two sequences; of one no token is left."""
    numbers_BT = jnp.array([[1, 1, 2, 2], [1, 1, 0, 0]])
    where = Sequences(numbers_BT, jnp.array([2, 2]))
    options = {"divisor": 2.0} if build is constant else {}
    values_BT = jnp.ones((2, 4))
    for count, expected in (("learnt", 1.0), ("all", 0.75)):
        aggregation = build(count=count, **options)
        found = Mean(aggregation.total(values_BT, where), aggregation.weight(where))
        assert float(found.value) == pytest.approx(expected)


def test_sums_over_sequences_of_a_row():
    numbers_BT = jnp.array([[1, 0, 1, 2, 2, 0]])
    where = Sequences(numbers_BT, jnp.array([2]))
    values_BT = jnp.array([[1.0, 50.0, 2.0, -3.0, -4.0, jnp.nan]])
    np.testing.assert_array_equal(where.sum(values_BT), [[3, 0, 3, -7, -7, 0]])
    np.testing.assert_array_equal(where.mean(values_BT), [[1.5, 0, 1.5, -3.5, -3.5, 0]])
    np.testing.assert_array_equal(where.largest(values_BT), [[2, 0, 2, -3, -3, 0]])
    slope_BT = jax.grad(lambda x: jnp.sum(where.sum(x) ** 2))(
        jnp.where(numbers_BT > 0, values_BT, 0)
    )
    np.testing.assert_array_equal(slope_BT, [[12, 0, 12, -28, -28, 0]])
