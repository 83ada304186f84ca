"""A `Mean` does not depend on how what it is over was cut, and a mean over nothing is 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.mean import Mean


def mean_of(values, weights) -> Mean:
    return Mean(jnp.sum(jnp.asarray(values) * jnp.asarray(weights)), jnp.sum(jnp.asarray(weights)))


def test_a_sum_of_means_is_the_mean_of_everything():
    """The parts are ragged, so that a mean of their means would be 2.75, not 2."""
    parts = mean_of([1.0, 1.0, 2.0], [1.0, 1.0, 1.0]), mean_of([4.0, 9.0], [1.0, 0.0])
    assert (parts[0] + parts[1]).value == 2


@pytest.mark.parametrize(
    "weights, expected", [([1.0, 3.0], 1.75), ([0.1, 0.1], 1.5), ([0.0, 0.0], 0.0)]
)
def test_value_divides_by_the_weight_whatever_its_size(weights, expected):
    """Also by a weight below 1. The value over nothing is 0."""
    mean = mean_of([1.0, 2.0], weights)
    np.testing.assert_allclose(mean.value, expected, rtol=2e-7)  # two roundings


def test_the_host_divides_by_the_same_rule():
    """It divides in double precision what was added up in float32 on the device."""
    on_host = jax.tree.map(float, mean_of([1.0, 0.0], [1.0, 2.0]))
    assert isinstance(on_host.value, float) and on_host.value == 1 / 3
    assert Mean(0.0, 0.0).value == 0.0


def test_value_and_gradient_of_a_mean_over_nothing_are_zero():
    value, slope = jax.value_and_grad(lambda total: Mean(0 * total, jnp.zeros(())).value)(1.0)
    assert value == 0 and slope == 0


def test_a_factor_scales_the_value_and_leaves_the_weight():
    mean = 0.5 * mean_of([1.0, 2.0], [1.0, 1.0])
    assert mean.value == 0.75 and mean.weight == 2


def test_a_mean_is_a_pytree():
    """It can be carried through a scan over microbatches."""
    values = jnp.arange(6.0).reshape(3, 2)
    total, _ = jax.lax.scan(
        lambda mean, x: (mean + mean_of(x, jnp.ones(2)), None), mean_of([0.0], [0.0]), values
    )
    assert total.value == 2.5
