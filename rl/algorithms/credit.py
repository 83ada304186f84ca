"""Advantages that share a completion's reward out by entropy, or by what others wrote.

Both kinds compare tokens at the same place of completions of the same prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from errors import UserError
from rl.algorithms.experience import Advantage, Advantages, Experience, per_trajectory
from rl.algorithms.tokens import needing


def entropy_tokens(
    *, alpha: float = 0.1, reward: float = 1.0, success: float = 1.0, eps: float = 1e-6
) -> Advantage:
    """Builds GTPO's advantage: uncertain tokens of right completions earn more (arXiv 2508.04349).

        right:  r[t] =  reward + alpha H[t] / (sum_k H[k, t]) d[t]
        wrong:  r[t] = -reward - alpha (1 / H[t]) / (sum_k 1 / H[k, t]) h[t]

    Prompts whose completions are all right or all wrong teach nothing.

    Sums are over the right, or wrong, completions of the prompt that still go on at place t, d[t]
    or h[t] of them. A is the z-score over all tokens of right completions of the prompt, and over
    those of wrong ones. Entropies have no gradient.

    Args:
      alpha, reward: the paper's alpha_2 and alpha_1, whose texts disagree on their sum; its code
        has 0.1 and 1.
      success: the least reward of a right completion.
      eps: added to the standard deviation.
    """

    def advantage(experience: Experience) -> Advantages:
        shaped_BT = shaped_rewards(experience, alpha, reward, success)
        right_N = right(experience, success)
        A_BT = _zscore_by_side(experience, shaped_BT, right_N, eps)
        return Advantages(jnp.where(experience.at_tokens(_mixed(experience, right_N)), A_BT, 0.0))

    return needing(advantage, "entropy", "group")


def shaped_rewards(
    experience: Experience, alpha: float, reward: float, success: float = 1.0
) -> Array:
    """Returns GTPO's rewards r[t] of tokens, [B, T], see `entropy_tokens`."""
    assert experience.entropy_BT is not None
    entropy_NT = experience.table_NT(jnp.maximum(experience.entropy_BT, 1e-8), 0.0)
    there_NT = experience.table_NT(experience.mask_BT.astype(jnp.float32), 0.0)
    right_N = right(experience, success)

    def share(weights_NT: Array, side_N: Array) -> Array:
        """Returns a token's weight over the mean weight of its place and side."""
        of_side_NT = jnp.where(side_N[:, None], weights_NT * there_NT, 0.0)
        sums_NT = jax.vmap(experience.group_sum, 1, 1)(of_side_NT)
        going_NT = jax.vmap(experience.group_sum, 1, 1)(jnp.where(side_N[:, None], there_NT, 0.0))
        return weights_NT / jnp.maximum(sums_NT, 1e-30) * going_NT

    inverse_NT = jnp.where(there_NT > 0, 1 / jnp.maximum(entropy_NT, 1e-8), 0.0)
    gain_NT = reward + alpha * share(entropy_NT, right_N)
    loss_NT = -reward - alpha * share(inverse_NT, ~right_N)
    return experience.of_table(jnp.where(right_N[:, None], gain_NT, loss_NT))


def entropy_sequences(
    *, beta: float = 0.1, reward: float = 1.0, success: float = 1.0, eps: float = 1e-6
) -> Advantage:
    """Builds GRPO-S's advantage: the same of whole completions (arXiv 2508.04349).

        right:  r[i] =  reward + beta H[i] / (sum_k H[k]) n
        wrong:  r[i] = -reward - beta (1 / H[i]) / (sum_k 1 / H[k]) m

    with H the mean entropy of a completion, n and m the right and wrong ones of the prompt; A is
    the z-score over each of the two.
    """

    def advantage(experience: Experience) -> Array:
        assert experience.entropy_BT is not None
        entropy_N = jnp.maximum(experience.mean_N(experience.entropy_BT), 1e-8)
        right_N = right(experience, success)

        def share(weights_N: Array, side_N: Array) -> Array:
            sums_N = experience.group_sum(jnp.where(side_N, weights_N, 0.0))
            count_N = experience.group_sum(side_N.astype(jnp.float32))
            return weights_N / jnp.maximum(sums_N, 1e-30) * count_N

        wrong_N = experience.present_N & ~right_N
        shaped_N = jnp.where(
            right_N,
            reward + beta * share(entropy_N, right_N),
            -reward - beta * share(1 / entropy_N, wrong_N),
        )
        A_N = _zscore(experience, shaped_N, right_N, eps)
        return jnp.where(_mixed(experience, right_N), A_N, 0.0)

    return needing(per_trajectory(advantage), "entropy", "group")


def conflicts(
    *,
    form: str = "corrected",
    weight: float = 2.0,
    entropy_scale: float = 0.1,
    most_entropy: float = 0.7,
) -> Advantage:
    """Builds the advantage of trajectory-based policy optimization (GTPO, arXiv 2508.03772).

        A[i] = r[i] - mean(r) - entropy_scale H[i], 0 where H[i] > most_entropy

    H is the mean entropy of a completion, in nats. A token is in conflict if a completion of the
    prompt with a positive advantage and one with a negative have it at the same place, counted from
    the start or from the end, and so do all tokens before it, or behind it. Its weight is then
    `weight` in the former, and 0 in the latter; with both counts the two weights multiply. All
    weights of a completion are over the number of its tokens in conflict (at least 1).

    Args:
      form: "corrected" counts a token once that is in conflict from the start or from the end |
        "reference", as the authors' code, takes the places from the end for places from the start
        when it counts.
      weight, entropy_scale, most_entropy: the authors' code has 2, 0.1 and 0.7, about log 2.
    """
    if form not in ("corrected", "reference"):
        raise UserError('form must be "corrected" or "reference"')

    def advantage(experience: Experience) -> Advantages:
        assert experience.entropy_BT is not None
        centred_N = experience.group_centred(experience.total_N)
        entropy_N = experience.mean_N(experience.entropy_BT)
        A_N = jnp.where(entropy_N > most_entropy, 0.0, centred_N - entropy_scale * entropy_N)
        A_N = jnp.where(experience.present_N & experience.differs, A_N, 0.0)
        weights_NT, count_N = conflict_weights(experience, centred_N, form, weight)
        weights_BT = experience.of_table(weights_NT) / experience.at_tokens(count_N).clip(1)
        return Advantages(experience.at_tokens(A_N), weights_BT=weights_BT)

    return needing(advantage, "entropy", "group")


def conflict_weights(
    experience: Experience, signs_N: Array, form: str, weight: float
) -> tuple[Array, Array]:
    """Returns the weight of each token [N, T], and the conflicts of each completion [N].

    Args:
      signs_N: what is positive in right completions, negative in wrong ones, 0 in others.
    """
    ids_NT = experience.table_NT(experience.tokens_BT, -1)
    there_NT = ids_NT >= 0
    T = ids_NT.shape[1]
    lengths_N1 = jnp.sum(there_NT, axis=1, keepdims=True)
    mirror_NT = lengths_N1 - 1 - jnp.arange(T)
    from_end_NT = jnp.where(
        mirror_NT >= 0, jnp.take_along_axis(ids_NT, jnp.maximum(mirror_NT, 0), axis=1), -1
    )
    positive_N, negative_N = signs_N > 0, signs_N < 0

    def run(table_NT: Array) -> Array:
        """Returns which tokens are in conflict, as all before them in the table are."""

        def of_one(row: tuple[Array, Array]) -> Array:
            ids_T, group = row
            same_NT = (table_NT == ids_T) & (experience.groups_N == group)[:, None]
            both_T = jnp.any(same_NT & positive_N[:, None], axis=0)
            both_T &= jnp.any(same_NT & negative_N[:, None], axis=0)
            return jnp.cumprod(both_T & (ids_T >= 0)).astype(bool)

        # A completion at a time: a table [N, N, T] would not fit.
        found_NT = jax.lax.map(of_one, (table_NT, experience.groups_N))
        return found_NT & (signs_N != 0)[:, None]

    start_NT, end_NT = run(ids_NT), run(from_end_NT)
    ends_at_NT = (mirror_NT >= 0) & jnp.take_along_axis(end_NT, jnp.maximum(mirror_NT, 0), axis=1)
    of_sign_N1 = jnp.where(positive_N, weight, 0.0)[:, None]
    weights_NT = jnp.where(start_NT, of_sign_N1, 1.0) * jnp.where(ends_at_NT, of_sign_N1, 1.0)
    counted_NT = start_NT | (ends_at_NT if form == "corrected" else end_NT)
    return weights_NT, jnp.sum(counted_NT, axis=1).astype(jnp.float32)


def right(experience: Experience, success: float) -> Array:
    """Returns which completions earn at least `success`, bool."""
    return experience.present_N & (experience.total_N >= success)


def _mixed(experience: Experience, right_N: Array) -> Array:
    """Returns which completions are of a prompt with right and wrong ones, bool."""
    count_N = experience.group_sum(right_N.astype(jnp.float32))
    return (count_N > 0) & (count_N < experience.group_sizes_N)


def _zscore_by_side(experience: Experience, values_BT: Array, right_N: Array, eps: float) -> Array:
    """Returns the z-score over the tokens of right, and of wrong, completions of each prompt."""
    places_BT = jnp.where(experience.mask_BT, experience.trajectory_BT, experience.size)
    least_N = jax.ops.segment_min(values_BT.ravel(), places_BT.ravel(), experience.size + 1)[:-1]
    values_BT = values_BT - experience.at_tokens(_side_least(experience, least_N, right_N))
    count_N = experience.lengths_N
    mean_N = _side_mean(experience, experience.mean_N(values_BT), count_N, right_N)
    centred_BT = jnp.where(experience.mask_BT, values_BT - experience.at_tokens(mean_N), 0.0)
    square_N = experience.mean_N(jnp.square(centred_BT))
    std_N = jnp.sqrt(_side_mean(experience, square_N, count_N, right_N))
    return centred_BT / (experience.at_tokens(std_N) + eps)


def _zscore(experience: Experience, values_N: Array, right_N: Array, eps: float) -> Array:
    """Returns the z-score over the right, and the wrong, completions of each prompt."""
    ones_N = jnp.ones(experience.size)
    values_N = values_N - _side_least(experience, values_N, right_N)
    centred_N = values_N - _side_mean(experience, values_N, ones_N, right_N)
    std_N = jnp.sqrt(_side_mean(experience, jnp.square(centred_N), ones_N, right_N))
    return jnp.where(experience.present_N, centred_N / (std_N + eps), 0.0)


def _side_mean(experience: Experience, values_N: Array, counts_N: Array, right_N: Array) -> Array:
    """Returns the mean over the completions of a prompt that are right, or wrong, as each is."""

    def mean(side_N: Array) -> Array:
        weights_N = jnp.where(side_N, counts_N, 0.0)
        sums_N = experience.group_sum(weights_N * values_N)
        return sums_N / jnp.maximum(experience.group_sum(weights_N), 1.0)

    return jnp.where(right_N, mean(right_N), mean(experience.present_N & ~right_N))


def _side_least(experience: Experience, values_N: Array, right_N: Array) -> Array:
    """Returns the least of those, so that where all are equal what is left of them is exactly 0."""

    def least(side_N: Array) -> Array:
        values = jnp.where(side_N, values_N, jnp.inf)
        return jax.ops.segment_min(values, experience.groups_N, experience.size)[
            experience.groups_N
        ]

    found_N = jnp.where(right_N, least(right_N), least(experience.present_N & ~right_N))
    return jnp.where(jnp.isfinite(found_N), found_N, 0.0)


CREDITS: dict[str, Callable[..., Advantage]] = {
    "entropy_tokens": entropy_tokens,
    "entropy_sequences": entropy_sequences,
    "conflicts": conflicts,
}
