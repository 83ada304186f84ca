"""The one matmul against einsum, and that it is one matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.layers.linear import linear
from tests import tiny

SHAPES = {
    "plain": ((2, 3, 5), (5, 7), 1, "btd,df->btf"),
    "to heads": ((2, 3, 5), (5, 4, 6), 1, "btr,rnh->btnh"),
    "from heads": ((2, 3, 4, 6), (4, 6, 5), 2, "btnv,nvd->btd"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_linear_is_the_einsum_and_so_are_its_gradients(case):
    x_shape, w_shape, axes, names = SHAPES[case]
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))

    def both(function):
        return jax.value_and_grad(
            lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=(0, 1)
        )(x, weight)

    tiny.assert_close(
        both(lambda x, w: linear(x, w, axes)),
        both(lambda x, w: jnp.einsum(names, x, w)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_dtypes():
    """The weight follows x; the result follows x, or what is asked for, accumulated in it."""
    x, weight = (
        jnp.full((1, 1, 100), 1.0, jnp.bfloat16),
        jnp.full((100, 1), 1 + 1 / 128, jnp.float32),
    )
    assert linear(x, weight).dtype == jnp.bfloat16
    exact = linear(x, weight, output=jnp.float32)
    assert (
        exact.dtype == jnp.float32 and float(exact[0, 0, 0]) == 100.78125
    )  # bfloat16 counts in halves there


def test_the_gradient_contracts_one_dimension():
    """Batch and time are one dimension in every matmul of the backward pass too: that is what the
    function is for.
    """
    x, weight = jnp.zeros((2, 3, 5)), jnp.zeros((5, 7))
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(jnp.sin(linear(x, w)))))(weight)
    dots = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(dots) == 2
    assert all(len(dot.params["dimension_numbers"][0][0]) == 1 for dot in dots)
