"""Estimates how far the policy is from the reference, token by token.

An estimator is a function (logprobs_BT, reference_logprobs_BT, ratio_BT) -> divergence_BT, float32,
of tokens that pi_old sampled; ratio_BT is the token ratio pi / pi_old with its gradient. With d =
log pi - log pi_ref, and tokens sampled from pi itself:

                value averages to             gradient, as a loss, averages to
  k3            KL(pi | ref), low variance    that of KL(ref | pi), the forward KL
  unbiased_k3   KL(pi | ref), low variance    that of KL(pi | ref), and both hold for any pi_old

(http://joschu.net/blog/kl-approx.html; tests/rl/test_divergences.py enumerates all of it.)
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


def k3(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """Estimates the KL with the gradient of the forward KL (GRPO, arXiv 2402.03300, eq. 4).

        exp(-d) + d - 1,  d = log pi - log pi_ref

    It is never negative. Its gradient, 1 - exp(-d) per unit of log pi, has no bound where the
    policy has left a token that the reference likes.
    """
    d_BT = logprobs_BT.astype(jnp.float32) - reference_logprobs_BT.astype(jnp.float32)
    # By expm1: near d = 0 the naive form loses every digit of d^2 / 2.
    return jnp.expm1(-d_BT) + d_BT


def unbiased_k3(logprobs_BT: Array, reference_logprobs_BT: Array, ratio_BT: Array) -> Array:
    """Estimates the KL with its own gradient (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

        r (exp(-d) + d - 1),  r = pi / pi_old

    The ratio is live and not clipped.
    """
    return ratio_BT * k3(logprobs_BT, reference_logprobs_BT, ratio_BT)
