"""From the rewards of a group of completions to the advantage of each.

Every advantage is a function rewards_PG -> advantages_PG, float32: P prompts, G completions of
each. A completion is compared with the others of its prompt, so a group whose rewards are all equal
teaches nothing: its advantages are exactly 0. A group of one is such a group.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Advantage = Callable[[Array], Array]


def group_centred(rewards_PG: Array) -> Array:
    """Returns the reward less the mean of its group (Dr.GRPO, arXiv 2503.20783, section 3.2).

    A[i] = r[i] - mean(r)
    """
    # Taken from the first reward of the group, so that equal rewards stay exactly equal: the mean
    # of eight times 1.1 is not 1.1 in float32, and a z-score would blow that rounding up to an
    # advantage of 0.1.
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    rewards_PG = rewards_PG - rewards_PG[:, :1]
    return rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)


def group_zscore(*, ddof: int, eps: float) -> Advantage:
    """Divides the centred reward by the standard deviation of its group.

    This is GRPO's advantage with outcome supervision (arXiv 2402.03300, section 4.1.2).

        A[i] = (r[i] - mean(r)) / (std(r) + eps)

    Args:
      ddof: 1 divides the squared deviations by G - 1, 0 by G. The paper leaves it open.
      eps: added to the standard deviation, in units of the reward.
    """

    def advantage(rewards_PG: Array) -> Array:
        centred_PG = group_centred(rewards_PG)
        # A group of one has no spread: its advantage is 0 / eps, not 0 / 0.
        degrees = max(rewards_PG.shape[1] - ddof, 1)
        std_P1 = jnp.sqrt(jnp.sum(jnp.square(centred_PG), axis=1, keepdims=True) / degrees)
        return centred_PG / (std_P1 + eps)

    return advantage


def leave_one_out(rewards_PG: Array) -> Array:
    """Returns the reward less the mean of the *other* completions' of its prompt.

    This is RLOO's advantage (arXiv 2402.14740).

        A[i] = r[i] - sum_{j != i} r[j] / (G - 1) = (r[i] - mean(r)) * G / (G - 1)
    """
    group = rewards_PG.shape[1]
    return group_centred(rewards_PG) * (group / max(group - 1, 1))
