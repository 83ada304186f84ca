"""How far the policy has gone from the reference, token by token.

An estimator is a function (logprobs_BT, reference_logprobs_BT, ratio_BT) -> divergence_BT, float32,
of tokens that pi_old sampled; ratio_BT is the token ratio pi / pi_old with its gradient. With d =
log pi - log pi_ref, and tokens sampled from pi itself:

                value averages to             gradient, as a loss, averages to
  k1            KL(pi | ref)                  0: useless as a loss, right inside a reward
  k2            not the KL (too large here)   that of KL(pi | ref)
  k3            KL(pi | ref), low variance    that of KL(ref | pi), the forward KL
  unbiased_k3   KL(pi | ref), low variance    that of KL(pi | ref), and both hold for any pi_old

(http://joschu.net/blog/kl-approx.html; REINFORCE++, arXiv 2501.03262; tests/rl/test_divergences.py
enumerates all of it.)
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Estimator = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A penalty that the loss adds: coefficient * estimator, per token."""

    estimator: Estimator
    coefficient: float


def _log_ratio(logprobs_BT: Array, reference_logprobs_BT: Array) -> Array:
    return logprobs_BT.astype(jnp.float32) - reference_logprobs_BT.astype(jnp.float32)


def k1(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """d: unbiased, of either sign, high variance. No gradient on average."""
    return _log_ratio(logprobs_BT, reference_logprobs_BT)


def k2(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """d^2 / 2: a biased value with the right gradient."""
    return jnp.square(_log_ratio(logprobs_BT, reference_logprobs_BT)) / 2


def k3(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """exp(-d) + d - 1 (GRPO, arXiv 2402.03300, eq. 4): the right value, never negative, with the
    gradient of the forward KL.

    That gradient, 1 - exp(-d) per unit of log pi, has no bound where the policy has left a token
    the reference likes.
    """
    d_BT = _log_ratio(logprobs_BT, reference_logprobs_BT)
    return jnp.expm1(-d_BT) + d_BT  # expm1: near d = 0 the naive form loses every digit of d^2 / 2


def unbiased_k3(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """r (exp(-d) + d - 1) with r = pi / pi_old live and unclipped (DeepSeek-V3.2, arXiv 2512.02556,
    section 3.1): the right value and the right gradient.
    """
    return ratio_BT * k3(logprobs_BT, reference_logprobs_BT, ratio_BT)
