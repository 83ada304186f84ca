"""A ratio is live and reads no padding; a clip cuts off the gradient on one side."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.surrogates import clipped, token_ratio

# By hand, with low 0.2 and high 0.28: (ratio, advantage) -> (objective, d objective / d ratio,
# clipped).
CASES = [
    (1.0, 2.0, 2.0, 2.0, False),  # on-policy: the advantage itself, not half of it
    (1.25, 2.0, 2.5, 2.0, False),
    (1.5, 2.0, 2.56, 0.0, True),  # 1.28 * 2
    (0.5, 2.0, 1.0, 2.0, False),  # a good token that became rarer is pulled back
    (0.5, -2.0, -1.6, 0.0, True),  # 0.8 * -2
    (0.9, -2.0, -1.8, -2.0, False),
    (1.5, -2.0, -3.0, -2.0, False),  # a bad token that became likelier is pushed down, unbounded
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize("ratio, advantage, objective, gradient, is_clipped", CASES)
def test_clipped_by_hand(ratio, advantage, objective, gradient, is_clipped):
    surrogate = clipped(low=0.2, high=0.28)
    ratio_BT, advantages_BT = jnp.array([[ratio]]), jnp.array([[advantage]])
    value_BT, clipped_BT = surrogate(ratio_BT, advantages_BT)
    slope_BT = jax.grad(lambda r: surrogate(r, advantages_BT)[0].sum())(ratio_BT)
    np.testing.assert_allclose(value_BT, [[objective]], rtol=1.2e-7)  # one rounding
    np.testing.assert_allclose(slope_BT, [[gradient]], rtol=1.2e-7)
    assert bool(clipped_BT[0, 0]) is is_clipped


def test_clipped_says_where_the_gradient_is_cut():
    rng = np.random.default_rng(0)
    ratio_BT, advantages_BT = (
        jnp.exp(jnp.array(rng.normal(size=(8, 32)))),
        jnp.array(rng.normal(size=(8, 32))),
    )
    surrogate = clipped(low=0.2, high=0.2)
    slope_BT = jax.grad(lambda r: surrogate(r, advantages_BT)[0].sum())(ratio_BT)
    chex.assert_trees_all_equal(surrogate(ratio_BT, advantages_BT)[1], slope_BT == 0)
    assert 0.2 < float(jnp.mean(slope_BT == 0)) < 0.8


def test_token_ratio_has_a_live_gradient():
    """d r / d log pi = r."""
    logprobs_BT, old_BT, mask_BT = (
        jnp.array([[-1.0, -2.0]]),
        jnp.array([[-1.5, -1.0]]),
        jnp.array([[True, True]]),
    )
    chex.assert_trees_all_close(
        token_ratio(logprobs_BT, old_BT, mask_BT), jnp.exp(jnp.array([[0.5, -1.0]])), rtol=1e-6
    )
    slope_BT = jax.grad(lambda x: token_ratio(x, old_BT, mask_BT).sum())(logprobs_BT)
    chex.assert_trees_all_close(slope_BT, jnp.exp(jnp.array([[0.5, -1.0]])), rtol=1e-6)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -jnp.inf, 1e4])
def test_token_ratio_does_not_read_padding(junk):
    logprobs_BT, old_BT = jnp.array([[-1.0, junk]]), jnp.array([[-1.5, -1.0]])
    for mask_BT in (jnp.array([[True, False]]), jnp.array([[1.0, 0.0]])):
        ratio_BT, slope_BT = (
            token_ratio(logprobs_BT, old_BT, mask_BT),
            jax.grad(lambda x, m=mask_BT: token_ratio(x, old_BT, m).sum())(logprobs_BT),
        )
        assert ratio_BT[0, 1] == 1 and slope_BT[0, 1] == 0
        assert jnp.isfinite(ratio_BT).all() and jnp.isfinite(slope_BT).all()


def test_token_ratio_is_computed_in_float32():
    """bfloat16 log-probs round by 0.4 %; their difference must not round again."""
    logprobs_BT, old_BT = jnp.array([[-3.0]], jnp.bfloat16), jnp.array([[-3.001]], jnp.float32)
    np.testing.assert_allclose(
        token_ratio(logprobs_BT, old_BT, jnp.ones((1, 1), bool)), np.exp(0.001), rtol=1e-6
    )
