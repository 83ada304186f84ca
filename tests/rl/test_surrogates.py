"""A ratio is live and reads no padding; a clip cuts off the gradient on one side."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from rl.algorithms import ratios, surrogates
from rl.algorithms.sequences import Sequences
from rl.algorithms.surrogates import cispo, clipped
from rl.algorithms.tokens import Tokens

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


def tokens_of(logprobs_BT, old_BT, advantages_BT=None, mask_BT=None) -> Tokens:
    mask_BT = jnp.ones(logprobs_BT.shape, bool) if mask_BT is None else mask_BT
    nothing_BT = jnp.zeros(logprobs_BT.shape)
    return Tokens(
        sequences=Sequences(mask_BT.astype(jnp.int32), jnp.ones(len(mask_BT), jnp.int32)),
        logprobs_BT=logprobs_BT,
        entropy_BT=nothing_BT,
        old_BT=old_BT,
        sampler_BT=old_BT,
        advantages_BT=nothing_BT if advantages_BT is None else advantages_BT,
    )


def with_advantages(advantages_BT) -> Tokens:
    nothing_BT = jnp.zeros(advantages_BT.shape)
    return tokens_of(nothing_BT, nothing_BT, advantages_BT)


def token_ratio(logprobs_BT, old_BT, mask_BT):
    return ratios.token()(tokens_of(logprobs_BT, old_BT, mask_BT=mask_BT > 0))


@pytest.mark.parametrize("ratio, advantage, objective, gradient, is_clipped", CASES)
def test_clipped_by_hand(ratio, advantage, objective, gradient, is_clipped):
    surrogate = clipped(low=0.2, high=0.28)
    ratio_BT, tokens = jnp.array([[ratio]]), with_advantages(jnp.array([[advantage]]))
    value_BT, low_BT, high_BT = surrogate(tokens, ratio_BT)
    slope_BT = jax.grad(lambda r: surrogate(tokens, r).gain_BT.sum())(ratio_BT)
    np.testing.assert_allclose(value_BT, [[objective]], rtol=1.2e-7)  # one rounding
    np.testing.assert_allclose(slope_BT, [[gradient]], rtol=1.2e-7)
    assert bool(low_BT[0, 0] | high_BT[0, 0]) is is_clipped


def test_clipped_says_where_the_gradient_is_cut():
    rng = np.random.default_rng(0)
    ratio_BT, advantages_BT = (
        jnp.exp(jnp.array(rng.normal(size=(8, 32)))),
        jnp.array(rng.normal(size=(8, 32))),
    )
    surrogate = clipped(low=0.2, high=0.2)
    tokens = with_advantages(advantages_BT)
    slope_BT = jax.grad(lambda r: surrogate(tokens, r).gain_BT.sum())(ratio_BT)
    gain = surrogate(tokens, ratio_BT)
    chex.assert_trees_all_equal(gain.low_BT | gain.high_BT, slope_BT == 0)
    assert not jnp.any(gain.low_BT & gain.high_BT)
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


@pytest.mark.parametrize("name", ratios.RATIOS)
def test_a_ratio_by_hand_and_its_gradient(name):
    """Log-ratios 0.5 and -1: by numeric differences, where the value has the gradient's meaning."""
    logprobs_BT, old_BT = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.5, -1.0, 7.0]])
    mask_BT = jnp.array([[True, True, False]])
    ratio = ratios.RATIOS[name]()
    expected = {
        "token": [np.exp(0.5), np.exp(-1)],
        "sequence": [np.exp(-0.25)] * 2,
        "sequence_token": [np.exp(-0.25)] * 2,
        "sequence_average": [(np.exp(0.5) + np.exp(-1)) / 2] * 2,
        "sequence_product": [np.exp(-0.5)] * 2,
        "on_policy": [1, 1],
    }[name]
    found = ratio(tokens_of(logprobs_BT, old_BT, mask_BT=mask_BT))
    np.testing.assert_allclose(found[0, :2], expected, rtol=1e-6)
    slopes = {
        "token": np.diag(expected),
        "sequence": np.full((2, 2), np.exp(-0.25) / 2),
        "sequence_token": np.diag(expected),
        "sequence_average": np.array([[np.exp(0.5), np.exp(-1)]] * 2) / 2,
        "sequence_product": np.full((2, 2), np.exp(-0.5)),
        "on_policy": np.eye(2),
    }[name]
    jacobian = jax.jacobian(lambda x: ratio(tokens_of(x, old_BT, mask_BT=mask_BT)))(logprobs_BT)
    np.testing.assert_allclose(jacobian[0, :2, 0, :2], slopes, rtol=1e-6)
    np.testing.assert_array_equal(jacobian[0, :2, 0, 2], 0)


@pytest.mark.parametrize("name", ["token", "sequence", "sequence_token", "sequence_average"])
def test_a_log_ratio_is_clamped_on_request(name):
    far = tokens_of(jnp.array([[-1.0, -1.0]]), jnp.array([[-31.0, -31.0]]))
    found = ratios.RATIOS[name](log_clamp=20.0)(far)
    np.testing.assert_allclose(found, np.exp(20.0), rtol=1e-6)
    assert jnp.all(ratios.RATIOS[name]()(far) > 1e12)


def test_both_conventions_of_cispos_bound():
    """TRL's is the ratio's, verl's its distance from 1."""
    tokens = with_advantages(jnp.ones((1, 4)))
    ratio_BT = jnp.array([[0.5, 1.0, 1.27, 6.0]])
    absolute, relative = cispo(high=5.0), cispo(low=0.2, high=0.28, bounds="relative")
    assert np.asarray(absolute(tokens, ratio_BT).high_BT).tolist() == [[False, False, False, True]]
    gain = relative(tokens, ratio_BT)
    assert np.asarray(gain.low_BT).tolist() == [[True, False, False, False]]
    assert np.asarray(gain.high_BT).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("name", ["cispo", "clipped"])
def test_bounds_without_one_between_them_are_refused(name):
    for options in ({"low": 2.0, "bounds": "absolute"}, {"low": -0.5}, {"bounds": "other"}):
        with pytest.raises(UserError, match="bounds"):
            surrogates.SURROGATES[name](**({"bounds": "relative"} | options))
