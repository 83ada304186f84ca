"""Draws are what their record says they are drawn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config import SamplingConfig
from rl.draw import draw, keep_likely


def brute_force(logprobs_V, top_k, top_p):
    """Token by token, likeliest first, until k are kept or those kept hold top_p of what the first
    k hold.
    """
    order = np.argsort(-logprobs_V)[: top_k or None]
    probs = np.exp(logprobs_V[order]) / np.exp(logprobs_V[order]).sum()
    kept, total = np.zeros(len(logprobs_V), bool), 0.0
    for token, prob in zip(order, probs, strict=True):
        if total >= top_p:
            break
        kept[token], total = True, total + prob
    return kept


@pytest.mark.parametrize("compiled", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_kept_are_those_of_brute_force(compiled):
    logprobs_BV = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(0), (6, 30)))
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.8), (5, 0.6), (1, 0.5), (40, 0.05)):
        keep = compiled(functools.partial(keep_likely, top_k=top_k, top_p=top_p))
        expected_BV = [brute_force(row, top_k, top_p) for row in np.asarray(logprobs_BV)]
        np.testing.assert_array_equal(keep(logprobs_BV), expected_BV)


@pytest.mark.parametrize("top_k, top_p", [(2, 1.0), (0, 0.4)])
def test_ties_are_all_kept(top_k, top_p):
    logprobs_BV = jnp.log(jnp.asarray([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    kept_BV = keep_likely(logprobs_BV, top_k, top_p)
    np.testing.assert_array_equal(kept_BV, [[True, True, True, True, False]])


def test_draws_follow_the_truncated_distribution():
    """50,000 draws of one row. Log-probs are those of the whole vocabulary; what is drawn from is
    their distribution over the tokens kept.
    """
    logits_V = jnp.asarray([2.0, 1.5, 1.0, 0.0, -1.0])
    settings = SamplingConfig(temperature=0.5, top_k=4, top_p=0.9)
    draws = 50_000
    tokens_B, logprobs_B, log_kept_B, kept_BV = draw(
        settings, jnp.broadcast_to(logits_V, (draws, 5)), jax.random.split(jax.random.key(0), draws)
    )
    logprobs_V = np.asarray(jax.nn.log_softmax(logits_V / 0.5))
    kept_V = brute_force(logprobs_V, 4, 0.9)
    assert 1 < kept_V.sum() < 4
    np.testing.assert_array_equal(kept_BV, np.broadcast_to(kept_V, kept_BV.shape))
    np.testing.assert_allclose(logprobs_B, logprobs_V[tokens_B], atol=1e-6)
    np.testing.assert_allclose(log_kept_B, np.log(np.exp(logprobs_V[kept_V]).sum()), atol=1e-6)
    expected_V = np.where(kept_V, np.exp(logprobs_V), 0) / np.exp(logprobs_V[kept_V]).sum()
    # Four standard deviations of a frequency over 50,000 draws: 4 * sqrt(0.25 / 50,000).
    np.testing.assert_allclose(np.bincount(tokens_B, minlength=5) / draws, expected_V, atol=9e-3)
