"""The ratio of the policy to the one that sampled, and what is maximised in its place.

A ratio is a function (logprobs_BT, old_logprobs_BT, mask_BT) -> ratio_BT with a live gradient to
logprobs_BT; where mask_BT is 0 it is 1, without gradient. A surrogate is a function (ratio_BT,
advantages_BT) -> (objective_BT, clipped_BT): what each token adds to the objective, to be
maximised, and whether its gradient was cut off there (bool, for the clip fraction).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Ratio = Callable[[Array, Array, Array], Array]
Surrogate = Callable[[Array, Array], tuple[Array, Array]]


def token_ratio(logprobs_BT: Array, old_logprobs_BT: Array, mask_BT: Array) -> Array:
    """Returns how much likelier each token has become (PPO, arXiv 1707.06347, section 3).

        r[t] = pi(o[t]) / pi_old(o[t])

    It is not clamped: log r is at most -log pi_old, of a token that pi_old did sample.
    """
    log_ratio_BT = logprobs_BT.astype(jnp.float32) - old_logprobs_BT.astype(jnp.float32)
    return jnp.exp(jnp.where(mask_BT, log_ratio_BT, 0))


def clipped(*, low: float, high: float) -> Surrogate:
    """Builds the clipped surrogate (PPO, arXiv 1707.06347, eq. 7).

        min(r A, clip(r, 1 - low, 1 + high) A)

    With high > low it is clip-higher (DAPO, arXiv 2503.14476, eq. 10). A token that has moved past
    the bound in the direction of its advantage has no gradient. One that has moved the other way
    always has.
    """

    def surrogate(ratio_BT: Array, advantages_BT: Array) -> tuple[Array, Array]:
        bounded_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
        objective_BT = jnp.minimum(ratio_BT * advantages_BT, bounded_BT * advantages_BT)
        too_high_BT = (advantages_BT > 0) & (ratio_BT > 1 + high)
        too_low_BT = (advantages_BT < 0) & (ratio_BT < 1 - low)
        return objective_BT, too_high_BT | too_low_BT

    return surrogate
