"""Advantages of single tokens: of what comes after each.

A token's reward is minus its penalty (such as a divergence, where `kl_in` is "reward"); the last
token of a completion that is learnt from earns the outcome as well. Tokens that are not learnt
from, such as a tool's, are passed over: what comes after them counts for what came before.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from errors import UserError
from rl.algorithms.experience import Advantage, Advantages, Experience
from rl.algorithms.outcomes import group_centred, group_zscore, leave_one_out, reward
from rl.algorithms.tokens import needing


def token_rewards(experience: Experience) -> Array:
    """Returns what each token earns, [B, T]."""
    earned_BT = jnp.where(experience.last_BT, experience.at_tokens(experience.outcome_N), 0.0)
    if experience.penalty_BT is None:
        return earned_BT
    return earned_BT - jnp.where(experience.mask_BT, experience.penalty_BT, 0.0)


def discounted(
    *,
    gamma: float = 1.0,
    whiten: bool = True,
    whiten_ddof: int = 1,
    baseline: str = "none",
    eps: float = 1e-6,
) -> Advantage:
    """Builds REINFORCE++'s advantage (arXiv 2501.03262).

        G[t] = r[t] + gamma G[t + 1],  A = whiten(G)

    Args:
      whiten: mean 0 and variance 1 over all tokens of the step.
      whiten_ddof: the variance divides by the number of tokens less this; OpenRLHF has 0.
      baseline: the outcome is as it is: "none" | less the mean of its "group" | of the "others" |
        a "zscore", with `eps`; penalties come after, token by token, as in OpenRLHF.
    """
    _share("gamma", gamma)
    baselines = {
        "group": group_centred(),
        "others": leave_one_out(),
        "zscore": group_zscore(eps=eps),
    }
    if baseline not in ("none", *baselines):
        raise UserError(f"baseline must be one of none, {', '.join(baselines)}")

    def advantage(experience: Experience) -> Advantages:
        def add(carry, at):
            return (total_B := at[0] + gamma * carry[0],), total_B

        rewards_BT = token_rewards(experience)
        if baseline != "none":
            unpenalised = dataclasses.replace(experience, penalty_BT=None)
            compared_BT = baselines[baseline](unpenalised).advantages_BT
            rewards_BT += jnp.where(
                experience.last_BT, compared_BT - experience.at_tokens(experience.outcome_N), 0.0
            )
        returns_BT = experience.backwards(add, 1, rewards_BT)
        A_BT = experience.whitened(returns_BT, ddof=whiten_ddof) if whiten else returns_BT
        return Advantages(jnp.where(experience.differs, A_BT, 0.0))

    return advantage if baseline == "none" else needing(advantage, "group")


def whitened_centred(
    *,
    single: str = "zero",
    baseline: str = "group",
    penalty: str = "total",
    whiten: bool = True,
    whiten_ddof: int = 1,
) -> Advantage:
    """Builds the advantage of REINFORCE++ with a baseline (arXiv 2501.03262, section 3).

        A = whiten(r[i] - mean(r)), over all tokens of the step

    Args:
      baseline: the mean is of the "group" | 0: "none".
      penalty: what tokens lose is part of r, in all: "total" | each token's own is taken from its
        advantage before the whitening: "own", as in NeMo RL and slime.
      whiten: whether A is whitened at all; slime does it later.
      whiten_ddof: as of `discounted`; NeMo RL has 0.
    """
    if baseline not in ("group", "none") or penalty not in ("total", "own"):
        raise UserError("baseline must be one of group, none, and penalty one of total, own")
    of_completion = group_centred(single=single) if baseline == "group" else reward()

    def advantage(experience: Experience) -> Advantages:
        if penalty == "total" or experience.penalty_BT is None:
            A_BT = of_completion(experience).advantages_BT
        else:
            unpenalised = dataclasses.replace(experience, penalty_BT=None)
            A_BT = of_completion(unpenalised).advantages_BT
            A_BT -= jnp.where(experience.mask_BT, experience.penalty_BT, 0.0)
            A_BT = jnp.where(experience.differs, A_BT, 0.0)
        if whiten:
            A_BT = experience.whitened(A_BT, ddof=whiten_ddof)
        return Advantages(A_BT)

    return needing(advantage, "group")


def generalised(
    *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True, whiten_ddof: int = 1
) -> Advantage:
    """Builds generalised advantage estimation by a critic (GAE, arXiv 1506.02438, eq. 16).

        delta[t] = r[t] + gamma V[t + 1] - V[t]
        A[t] = delta[t] + gamma lam A[t + 1],  returns[t] = A[t] + V[t]

    V[t] is the critic's value of what comes before token t, and 0 behind the end.

    Args:
      lam: lambda; 1 is the return less the value.
      whiten: the advantages, not the returns, to mean 0 and variance 1 over the step's tokens.
      whiten_ddof: as of `discounted`.
    """
    _share("gamma", gamma)
    _share("lam", lam)

    def advantage(experience: Experience) -> Advantages:
        assert experience.values_BT is not None

        def add(carry, at):
            next_value_B, next_B = carry
            reward_B, value_B = at
            A_B = reward_B + gamma * next_value_B - value_B + gamma * lam * next_B
            return (value_B, A_B), A_B

        values_BT = experience.values_BT
        A_BT = experience.backwards(add, 2, token_rewards(experience), values_BT)
        returns_BT = jnp.where(experience.mask_BT, A_BT + values_BT, 0.0)
        A_BT = experience.whitened(A_BT, ddof=whiten_ddof) if whiten else A_BT
        return Advantages(jnp.where(experience.differs, A_BT, 0.0), returns_BT)

    return needing(advantage, "values")


def to_go(*, baseline: str = "none") -> Advantage:
    """Builds the sum of the rewards from a token on, undiscounted, less a baseline.

    Args:
      baseline: "none" | "greedy": the total reward of the greedy completion of the prompt, which is
        ReMax where penalties are taken token by token (arXiv 2310.10505).
    """
    if baseline not in ("none", "greedy"):
        raise UserError("baseline must be one of none, greedy")

    def advantage(experience: Experience) -> Advantages:
        found_BT = discounted(whiten=False)(experience).advantages_BT
        if baseline == "greedy":
            assert experience.greedy_N is not None
            found_BT = found_BT - experience.at_tokens(experience.greedy_N)
        return Advantages(jnp.where(experience.differs, found_BT, 0.0))

    return needing(advantage, "greedy") if baseline == "greedy" else advantage


def teacher(*, gamma: float = 0.0) -> Advantage:
    """Builds the advantage of on-policy distillation: minus the reverse KL, a token at a time.

        r[t] = log pi_teacher - log pi_old,  A[t] = r[t] + gamma A[t + 1]

    The teacher is the reference. With gamma = 0 each token answers for itself alone
    (thinkingmachines.ai/blog/on-policy-distillation; MiniLLM, arXiv 2306.08543, has the sum).
    Rewards of the task play no part.
    """
    _share("gamma", gamma)

    def advantage(experience: Experience) -> Advantages:
        assert experience.reference_BT is not None and experience.old_BT is not None

        def add(carry, at):
            return (total_B := at[0] + gamma * carry[0],), total_B

        return Advantages(experience.backwards(add, 1, experience.reference_BT - experience.old_BT))

    return needing(advantage, "reference", "teacher", "old")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} must be in [0, 1]")


RETURNS: dict[str, Callable[..., Advantage]] = {
    "discounted": discounted,
    "whitened_centred": whitened_centred,
    "generalised": generalised,
    "to_go": to_go,
    "teacher": teacher,
}
