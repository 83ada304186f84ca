import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.mean import Mean


def test_a_mean_of_pieces_is_the_mean():
    """Ragged pieces, so that a mean of means would be 2.75, not 2."""
    pieces = [
        Mean.of(jnp.array([1.0, 1.0, 2.0]), jnp.ones(3)),
        Mean.of(jnp.array([4.0, 9.0]), jnp.array([True, False])),
    ]
    assert sum(pieces, Mean.zero()).value == 2


@pytest.mark.parametrize(
    "weights, expected", [([1, 3], 1.75), ([0.1, 0.1], 1.5), ([0.0, 0.0], 0.0)]
)
def test_value_divides_by_the_weight_whatever_its_size(weights, expected):
    """A weight below 1 too; of nothing, 0."""
    np.testing.assert_allclose(
        Mean.of(jnp.array([1.0, 2.0]), jnp.array(weights)).value, expected, rtol=2e-7
    )  # two roundings


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf])
def test_unweighted_entries_are_never_read(junk):
    def loss(values):
        return Mean.of(values, jnp.array([1.0, 0.0])).value

    assert loss(jnp.array([3.0, junk])) == 3
    chex.assert_trees_all_equal(jax.grad(loss)(jnp.array([3.0, junk])), jnp.array([1.0, 0.0]))


def test_sums_are_float32():
    """257 ones: the first count that bfloat16 does not have."""
    mean = Mean.of(jnp.ones(257, jnp.bfloat16), jnp.ones(257, jnp.bfloat16))
    assert (
        mean.total.dtype == mean.weight.dtype == jnp.float32
        and float(mean.total) == float(mean.weight) == 257
    )


def test_weights_broadcast():
    mean = Mean.of(jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0], [0.0]]))
    assert mean.total == 3 and mean.weight == 3


def test_is_a_pytree():
    """It can be carried through a scan over microbatches."""
    values = jnp.arange(6.0).reshape(3, 2)
    total, _ = jax.lax.scan(
        lambda mean, x: (mean + Mean.of(x, jnp.ones(2)), None), Mean.zero(), values
    )
    assert total.value == 2.5
