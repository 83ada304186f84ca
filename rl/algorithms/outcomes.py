"""Advantages of whole completions: what one earned against others of its prompt, or of the step.

Each is built by a function of its options and gives all tokens of a completion the same advantage.
A completion is compared with the others of its prompt, so a group whose rewards are all equal
teaches nothing: its advantages are exactly 0 (but for those that say otherwise). So are those of a
group of one, unless `single` is "reward": then they are the reward itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from errors import UserError
from rl.algorithms.experience import Advantage, Experience, per_trajectory
from rl.algorithms.tokens import needing

SINGLES = ("zero", "reward")


def compared(function: Callable[[Experience], Array]) -> Advantage:
    """Makes an advantage that compares completions of one prompt, as `per_trajectory` does."""
    return needing(per_trajectory(function), "group")


def reward(*, baseline: str = "none") -> Advantage:
    """Builds REINFORCE's advantage: the reward (Williams, 1992).

    A[i] = r[i] - b

    Args:
      baseline: b is 0: "none" | the mean over the "step".
    """
    _one_of("baseline", baseline, ("none", "step"))

    def advantage(experience: Experience) -> Array:
        total_N = experience.total_N
        if baseline == "none":
            return jnp.where(experience.present_N & experience.differs, total_N, 0.0)
        return _centred_over_step(experience, total_N)

    return per_trajectory(advantage)


def group_centred(*, single: str = "zero") -> Advantage:
    """Builds the reward less the mean of its group (Dr.GRPO, arXiv 2503.20783, section 3.2).

    A[i] = r[i] - mean(r)
    """
    return compared(lambda experience: _centred(experience, experience.total_N, single))


def group_zscore(*, ddof: int = 1, eps: float = 1e-6, single: str = "zero") -> Advantage:
    """Builds GRPO's advantage with outcome supervision (arXiv 2402.03300, section 4.1.2).

        A[i] = (r[i] - mean(r)) / (std(r) + eps)

    Args:
      ddof: 1 divides the squared deviations by G - 1, 0 by G. The paper leaves it open.
      eps: added to the standard deviation, in units of the reward. TRL has 1e-4.
      single: of a group of one; "reward" is verl's.
    """
    _one_of("single", single, SINGLES)
    return compared(lambda experience: _zscore(experience, experience.total_N, ddof, eps, single))


def step_zscore(
    *, ddof: int = 1, eps: float = 1e-6, spread: str = "centred", single: str = "zero"
) -> Advantage:
    """Builds ScaleRL's advantage: centred in the group, scaled by the step (arXiv 2510.13786).

        A[i] = (r[i] - mean(r)) / (std + eps)

    Args:
      spread: std is over all completions of the step of the "centred" rewards, as in REINFORCE++
        and ScaleRL | of the "rewards" as they are, as in TRL.
    """
    _one_of("spread", spread, ("centred", "rewards"))

    def advantage(experience: Experience) -> Array:
        total_N = experience.total_N
        centred_N = _centred(experience, total_N, single)
        of_N = centred_N if spread == "centred" else total_N
        return centred_N / (experience.std(of_N, ddof) + eps)

    return compared(advantage)


def leave_one_out(*, single: str = "zero", spread: str = "none", eps: float = 1e-6) -> Advantage:
    """Builds RLOO's advantage: the reward less the mean of the *others* (arXiv 2402.14740).

        A[i] = r[i] - sum_{j != i} r[j] / (G - 1) = (r[i] - mean(r)) G / (G - 1)

    Args:
      spread: A is as it is: "none" | over the deviation of the "others" + eps, where they have one
        (NeMo RL) | to mean 0 and deviation 1 over the "step" (TRL's normalize_advantages).
    """
    _one_of("spread", spread, ("none", "others", "step"))

    def advantage(experience: Experience) -> Array:
        A_N = _against_others(experience, experience.total_N, spread == "others", eps, single)
        if spread != "step":
            return A_N
        return _centred_over_step(experience, A_N) / (experience.std(A_N, 1) + eps)

    return compared(advantage)


def _against_others(
    experience: Experience, values_N: Array, scaled: bool, eps: float, single: str
) -> Array:
    """Returns values less the mean of the others of their group, over their deviation if scaled."""
    sizes_N = experience.group_sizes_N
    centred_N = experience.group_centred(values_N)
    A_N = centred_N * (sizes_N / jnp.maximum(sizes_N - 1, 1))
    if scaled:
        # Of the others, by the sums of the group: about its mean, less what one's own adds.
        all_N = experience.group_sum(jnp.square(centred_N))
        own_N = jnp.square(centred_N) * (sizes_N / jnp.maximum(sizes_N - 1, 1))
        # What is left of equal others is the rounding of the sums.
        has_N = all_N - own_N > 1e-5 * all_N
        variance_N = jnp.where(has_N, all_N - own_N, 1.0) / jnp.maximum(sizes_N - 2, 1)
        A_N = jnp.where(has_N, A_N / (jnp.sqrt(variance_N) + eps), A_N)
    return _alone(experience, A_N, values_N, single)


def over_mean(*, eps: float = 0.0, single: str = "zero") -> Advantage:
    """Builds MaxRL's advantage (arXiv 2602.02710): the gradient of log of the pass rate.

        A[i] = (r[i] - mean(r)) / (mean(r) + eps)

    Rewards are not negative; a group whose mean is 0 or less has no advantages.
    """
    _one_of("single", single, SINGLES)

    def advantage(experience: Experience) -> Array:
        total_N = experience.total_N
        mean_N = experience.group_mean(total_N)
        scaled_N = experience.group_centred(total_N) / jnp.where(mean_N > 0, mean_N + eps, 1.0)
        return _alone(experience, jnp.where(mean_N > 0, scaled_N, 0.0), total_N, single)

    return compared(advantage)


def length_weighted(*, single: str = "zero") -> Advantage:
    """Builds OPO's advantage: the baseline of least variance (arXiv 2505.23585).

    A[i] = r[i] - sum_j |o_j| r[j] / sum_j |o_j|
    """
    _one_of("single", single, SINGLES)

    def advantage(experience: Experience) -> Array:
        # From centred rewards, so that equal ones give exactly 0.
        total_N, lengths_N = experience.total_N, experience.lengths_N
        centred_N = experience.group_centred(total_N)
        weight_N = jnp.maximum(experience.group_sum(lengths_N), 1.0)
        baseline_N = experience.group_sum(lengths_N * centred_N) / weight_N
        return _alone(experience, centred_N - baseline_N, total_N, single)

    return compared(advantage)


def signal_scaled(*, scale: str = "prompts", single: str = "zero") -> Advantage:
    """Builds GPG's advantage (arXiv 2504.02546): scaled up by how few have a signal.

        A[i] = alpha (r[i] - mean(r))

    Args:
      scale: alpha is all completions over those of groups with a signal: "prompts", as in the
        paper | over those whose reward is not 0: "rewards", as in verl | 1: "none".
    """
    _one_of("scale", scale, ("prompts", "rewards", "none"))

    def advantage(experience: Experience) -> Array:
        total_N = experience.total_N
        centred_N = _centred(experience, total_N, single)
        if scale == "none":
            return centred_N
        has_N = total_N != 0
        if scale == "prompts":
            has_N = experience.group_sum(jnp.abs(experience.group_centred(total_N))) > 0
        count = jnp.sum(experience.present_N & has_N)
        return centred_N * (jnp.sum(experience.present_N) / jnp.maximum(count, 1))

    return compared(advantage)


def greedy_baseline() -> Advantage:
    """Builds ReMax's advantage: the reward less that of the greedy completion (arXiv 2310.10505).

    A[i] = r[i] - r(greedy)
    """

    def advantage(experience: Experience) -> Array:
        assert experience.greedy_N is not None
        gap_N = experience.total_N - experience.greedy_N
        return jnp.where(experience.present_N, gap_N, 0.0)

    return needing(per_trajectory(advantage), "greedy")


def best_over_second(*, scaled: bool = True, eps: float = 1e-6) -> Advantage:
    """Builds pass@k's advantage: the best completion alone has one (arXiv 2503.19595).

        A[best] = r[best] - r[second best], / (std(r) + eps) if scaled

    Of several that are best the first counts, and its advantage is 0.
    """

    def advantage(experience: Experience) -> Array:
        total_N = jnp.where(experience.present_N, experience.total_N, -jnp.inf)
        groups_N, size = experience.groups_N, experience.size
        places_N = jnp.arange(size)

        def best(values_N: Array) -> tuple[Array, Array]:
            best_N = jax.ops.segment_max(values_N, groups_N, size)[groups_N]
            is_N = jnp.isfinite(values_N) & (values_N == best_N)
            first_N = jax.ops.segment_min(jnp.where(is_N, places_N, size), groups_N, size)
            return best_N, is_N & (places_N == first_N[groups_N])

        best_N, first_N = best(total_N)
        second_N, _ = best(jnp.where(first_N, -jnp.inf, total_N))
        gap_N = jnp.where(first_N & jnp.isfinite(second_N), best_N - second_N, 0.0)
        if not scaled:
            return gap_N
        std_N = experience.group_std(experience.group_centred(experience.total_N), 1)
        return gap_N / (std_N + eps)

    return compared(advantage)


def pass_at_k(*, k: int = 4, success: float = 1.0, eps: float = 1e-6) -> Advantage:
    """Builds the advantage of pass@k training (arXiv 2508.10751), in closed form.

    The reward of k completions drawn from a group is that any of them is right. Averaged over all
    draws, with c of G right and R = 1 - C(G - c, k) / C(G, k), s = sqrt(R (1 - R)):

        A[right] = (1 - R) / (s + eps)
        A[wrong] = (1 - R - C(G - c - 1, k - 1) / C(G - 1, k - 1)) / (s + eps)

    Args:
      success: the least reward of a right completion.

    Raises:
      UserError: k is not positive.
    """
    if k < 1:
        raise UserError("k must be at least 1")

    def none_right(wrong_N: Array, drawn: int, of_N: Array) -> Array:
        """Returns C(wrong, drawn) / C(of, drawn), 0 where fewer are wrong than drawn."""
        share_N = jnp.ones(wrong_N.shape)
        for j in range(drawn):
            share_N *= jnp.maximum(wrong_N - j, 0) / jnp.maximum(of_N - j, 1)
        return share_N

    def advantage(experience: Experience) -> Array:
        right_N = experience.present_N & (experience.total_N >= success)
        sizes_N = experience.group_sizes_N
        wrong_N = sizes_N - experience.group_sum(right_N.astype(jnp.float32))
        missed_N = none_right(wrong_N, k, sizes_N)
        std_N = jnp.sqrt(missed_N * (1 - missed_N))
        others_N = none_right(wrong_N - 1, k - 1, sizes_N - 1)
        gain_N = jnp.where(right_N, missed_N, missed_N - others_N)
        enough_N = experience.present_N & (sizes_N >= k) & (std_N > 0)
        return jnp.where(enough_N, gain_N / (std_N + eps), 0.0)

    return compared(advantage)


def per_reward(
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    single: str = "zero",
    scaled: bool = True,
    baseline: str = "mean",
    whiten: str = "completions",
    whiten_eps: float = -1.0,
) -> Advantage:
    """Builds GDPO's advantage: each reward is normalised in its group, then they are added.

        A[i] = whiten(sum_m weight[m] (r[m, i] - mean(r[m])) / (std(r[m]) + eps))

    (arXiv 2601.05242.) So that no reward drowns another.

    Args:
      scaled: whether each reward is over its deviation before they are added.
      baseline: of each reward is the "mean" of the group | that of the "others" (NeMo RL).
      whiten: mean 0 and variance 1 over the step's "completions", as in the paper and TRL | over
        its "tokens", as in verl | "none".
      whiten_eps: added to the deviation of the former; -1 is `eps`. NeMo RL has 0.
    """
    _one_of("baseline", baseline, ("mean", "others"))
    last_eps = eps if whiten_eps == -1 else whiten_eps
    _one_of("whiten", whiten, ("completions", "tokens", "none"))
    _one_of("single", single, SINGLES)

    def added(experience: Experience) -> Array:
        def normal(r_N: Array) -> Array:
            if baseline == "others":
                return _against_others(experience, r_N, scaled, eps, single)
            if not scaled:
                return _centred(experience, r_N, single)
            return _zscore(experience, r_N, ddof, eps, single)

        normal_MN = jax.vmap(normal)(experience.rewards_MN)
        return experience.weights_M @ normal_MN

    def over_completions(experience: Experience) -> Array:
        added_N = added(experience)
        if whiten == "none":
            return added_N
        std = experience.std(added_N, ddof)
        return _centred_over_step(experience, added_N) / jnp.where(std > 0, std + last_eps, 1.0)

    if whiten != "tokens":
        return compared(over_completions)

    def over_tokens(experience: Experience):
        given = per_trajectory(added)(experience)
        return given._replace(advantages_BT=experience.whitened(given.advantages_BT))

    return needing(over_tokens, "group")


def _centred(experience: Experience, values_N: Array, single: str) -> Array:
    _one_of("single", single, SINGLES)
    return _alone(experience, experience.group_centred(values_N), values_N, single)


def _zscore(experience: Experience, values_N: Array, ddof: int, eps: float, single: str) -> Array:
    centred_N = experience.group_centred(values_N)
    scaled_N = centred_N / (experience.group_std(centred_N, ddof) + eps)
    return _alone(experience, scaled_N, values_N / (1 + eps), single)


def _alone(experience: Experience, values_N: Array, reward_N: Array, single: str) -> Array:
    """Returns values, but the reward for groups of one where they are asked for."""
    if single == "zero":
        return values_N
    alone_N = experience.present_N & (experience.group_sizes_N == 1)
    return jnp.where(alone_N, reward_N, values_N)


def _centred_over_step(experience: Experience, values_N: Array) -> Array:
    count = jnp.maximum(jnp.sum(experience.present_N), 1)
    least = jnp.min(jnp.where(experience.present_N, values_N, jnp.inf))
    values_N = jnp.where(experience.present_N, values_N - least, 0.0)
    return jnp.where(experience.present_N, values_N - jnp.sum(values_N) / count, 0.0)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}")


OUTCOMES: dict[str, Callable[..., Advantage]] = {
    "reward": reward,
    "group_centred": group_centred,
    "group_zscore": group_zscore,
    "step_zscore": step_zscore,
    "leave_one_out": leave_one_out,
    "over_mean": over_mean,
    "length_weighted": length_weighted,
    "signal_scaled": signal_scaled,
    "greedy_baseline": greedy_baseline,
    "best_over_second": best_over_second,
    "pass_at_k": pass_at_k,
    "per_reward": per_reward,
}
