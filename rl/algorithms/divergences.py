"""Estimates how far the policy is from the reference, token by token.

An estimator is a function (logprobs_BT, reference_BT, ratio_BT) -> divergence_BT, float32, of
tokens that pi_old sampled; ratio_BT is the ratio pi / pi_old with its gradient. With d = log pi -
log pi_ref, and tokens sampled from pi itself:

                value averages to             gradient, as a loss, averages to
  k1            KL(pi | ref), high variance   nothing: 0
  absolute      more than the KL              of no divergence
  k2            d^2 / 2, about the KL         that of KL(pi | ref)
  k3            KL(pi | ref), low variance    that of KL(ref | pi), the forward KL
  ..._plus      that of k1, k3, absolute      that of k2
  unbiased_k3   KL(pi | ref), low variance    that of KL(pi | ref), and both hold for any pi_old

unbiased_k1 and unbiased_k2 are k1 and k2 by the same ratio; what the ratio is, `kl_ratio` says.

(http://joschu.net/blog/kl-approx.html; tests/rl/test_divergences.py enumerates all of it.) In the
reward, where no gradient flows, only the value counts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from rl.algorithms.ratios import clamped

Estimator = Callable[[Array, Array, Array], Array]


def difference(logprobs_BT: Array, reference_BT: Array) -> Array:
    """Returns d = log pi - log pi_ref, float32."""
    return logprobs_BT.astype(jnp.float32) - reference_BT.astype(jnp.float32)


def k1(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Returns d. It can be negative, and as a loss it teaches nothing: it is for the reward."""
    return difference(logprobs_BT, reference_BT)


def absolute(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Returns |d|."""
    return jnp.abs(difference(logprobs_BT, reference_BT))


def k2(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Returns d^2 / 2 (REINFORCE++ with a baseline, arXiv 2501.03262)."""
    return jnp.square(difference(logprobs_BT, reference_BT)) / 2


def k3(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Estimates the KL with the gradient of the forward KL (GRPO, arXiv 2402.03300, eq. 4).

        exp(-d) + d - 1

    It is never negative. Its gradient, 1 - exp(-d) per unit of log pi, has no bound where the
    policy has left a token that the reference likes.
    """
    d_BT = difference(logprobs_BT, reference_BT)
    # By expm1: near d = 0 the naive form loses every digit of d^2 / 2.
    return jnp.expm1(-d_BT) + d_BT


def plus(value: Estimator) -> Estimator:
    """Builds an estimator with the value of another and the gradient of k2."""

    def estimate(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
        value_BT = value(logprobs_BT, reference_BT, ratio_BT)
        slope_BT = k2(logprobs_BT, reference_BT, ratio_BT)
        return slope_BT + jax.lax.stop_gradient(value_BT - slope_BT)

    estimate.value = value
    return estimate


k1_plus, k3_plus, absolute_plus = plus(k1), plus(k3), plus(absolute)


def unbiased_k1(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Returns r d."""
    return ratio_BT * k1(logprobs_BT, reference_BT, ratio_BT)


def unbiased_k2(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Returns r d^2 / 2."""
    return ratio_BT * k2(logprobs_BT, reference_BT, ratio_BT)


def unbiased_k3(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
    """Estimates the KL with its own gradient (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

        r (exp(-d) + d - 1),  r = pi / pi_old

    The ratio is live and not clipped.
    """
    return ratio_BT * k3(logprobs_BT, reference_BT, ratio_BT)


def bounded(estimator: Estimator, log_clamp: float, clamp: float) -> Estimator:
    """Clamps d to +- log_clamp and the estimate to +- clamp; 0 does not.

    Where a clamp acts there is no gradient, but for that of k2 where a value has it. verl's k3 has
    20 and 10; the paper has none.
    """
    if not (log_clamp or clamp):
        return estimator
    if value := getattr(estimator, "value", None):
        return plus(bounded(value, log_clamp, clamp))

    def estimate(logprobs_BT: Array, reference_BT: Array, ratio_BT: Array) -> Array:
        reference_BT = reference_BT.astype(jnp.float32)
        d_BT = clamped(difference(logprobs_BT, reference_BT), log_clamp)
        return clamped(estimator(reference_BT + d_BT, reference_BT, ratio_BT), clamp)

    return estimate


ESTIMATORS: dict[str, Estimator] = {
    "k1": k1,
    "absolute": absolute,
    "k2": k2,
    "k3": k3,
    "k3_plus": k3_plus,
    "k1_plus": k1_plus,
    "absolute_plus": absolute_plus,
    "unbiased_k1": unbiased_k1,
    "unbiased_k2": unbiased_k2,
    "unbiased_k3": unbiased_k3,
}
