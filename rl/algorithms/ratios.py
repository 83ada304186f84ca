"""The ratio of the policy to the one that sampled: of a token, or of its whole completion.

A ratio is a function of `Tokens` that returns ratio_BT, float32, with a live gradient to the
log-probs. Each is built by a function of its options, the one way in which `log_clamp` is meant:
log r is clamped to +- log_clamp; 0 does not. Log r is at most -log pi_old of a token that pi_old
did sample, so it is off by default.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from rl.algorithms.tokens import PerToken, Tokens, ignoring


def token(*, log_clamp: float = 0.0) -> PerToken:
    """Builds the ratio of each token (PPO, arXiv 1707.06347, section 3).

    r[t] = pi(o[t]) / pi_old(o[t])
    """
    return lambda tokens: jnp.exp(clamped(tokens.log_ratio_BT, log_clamp))


def sequence(*, log_clamp: float = 0.0) -> PerToken:
    """Builds the geometric mean of the ratios of a completion (GSPO, arXiv 2507.18071, eq. 7).

        s = (pi(o) / pi_old(o))^(1 / |o|) = exp(1/|o| sum_t log r[t])

    Every token of the completion has it, and its gradient flows to all of them.
    """
    return lambda tokens: jnp.exp(clamped(tokens.sequences.mean(tokens.log_ratio_BT), log_clamp))


def sequence_token(*, log_clamp: float = 0.0) -> PerToken:
    """Builds GSPO-token (arXiv 2507.18071, eq. 14): the value is `sequence`'s.

        s[t] = sg[s] pi(o[t]) / sg[pi(o[t])]

    The gradient of a token's ratio flows to that token alone. Where all tokens of a completion have
    one advantage, loss and gradient are `sequence`'s.
    """

    def ratio(tokens: Tokens) -> Array:
        of_sequence_BT = tokens.sequences.mean(tokens.log_ratio_BT)
        own_BT = tokens.log_ratio_BT - jax.lax.stop_gradient(tokens.log_ratio_BT)
        return jnp.exp(clamped(jax.lax.stop_gradient(of_sequence_BT) + own_BT, log_clamp))

    return ratio


def sequence_average(*, log_clamp: float = 0.0) -> PerToken:
    """Builds the arithmetic mean of the ratios of a completion (GRPO-S, arXiv 2508.04349).

    w = 1/|o| sum_t r[t]
    """
    return lambda tokens: tokens.sequences.mean(jnp.exp(clamped(tokens.log_ratio_BT, log_clamp)))


def sequence_product(*, log_clamp: float = 0.0) -> PerToken:
    """Builds the ratio of a completion, the product of its tokens' (RLOO, arXiv 2402.14740).

    w = pi(o) / pi_old(o) = exp(sum_t log r[t])
    """
    return lambda tokens: jnp.exp(clamped(tokens.sequences.sum(tokens.log_ratio_BT), log_clamp))


def on_policy() -> PerToken:
    """Builds a ratio whose value is 1, with the gradient of log pi.

    r[t] = exp(log pi - sg[log pi])
    """

    def ratio(tokens: Tokens) -> Array:
        own_BT = jnp.where(tokens.mask_BT, tokens.logprobs_BT, 0.0)
        return jnp.exp(own_BT - jax.lax.stop_gradient(own_BT))

    return ignoring(ratio)


def clamped(log_ratio_BT: Array, most: float) -> Array:
    """Clamps a logarithm to +- most; 0 leaves it."""
    return jnp.clip(log_ratio_BT, -most, most) if most else log_ratio_BT


RATIOS: dict[str, Callable[..., PerToken]] = {
    "token": token,
    "sequence": sequence,
    "sequence_token": sequence_token,
    "sequence_average": sequence_average,
    "sequence_product": sequence_product,
    "on_policy": on_policy,
}
