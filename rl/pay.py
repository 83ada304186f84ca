"""What completions earn: each reward by its name, and the sum that is maximised."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.tasks.problem import Problem
from rl.algorithms.options import Options
from rl.config import EvaluateConfig, ReinforceConfig
from rl.generate import Completion
from rl.rewards import total_reward

OVERLONG = "overlong"
"""The name of the penalty of long completions among the rewards of a step."""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The rewards of P * G completions.

    Attributes:
      names: of M rewards.
      weights_M: float32.
      paid_MPG: float32, unweighted.
    """

    names: tuple[str, ...]
    weights_M: np.ndarray
    paid_MPG: np.ndarray

    @property
    def total_PG(self) -> np.ndarray:
        """The weighted sum; where all that is paid is equal, so are the sums, to the bit."""
        total_PG = np.zeros(self.paid_MPG.shape[1:], np.float32)
        for weight, paid_PG in zip(self.weights_M, self.paid_MPG, strict=True):
            total_PG = total_PG + weight * paid_PG
        return total_PG

    def of(self, name: str) -> np.ndarray:
        """Returns what one reward pays, [P, G]; "" is the weighted sum of all."""
        return self.paid_MPG[self.names.index(name)] if name else self.total_PG

    @classmethod
    def joined(cls, parts: Sequence["Rewards"]) -> "Rewards":
        """Returns the rewards of all groups, one after the other."""
        paid_MPG = np.concatenate([part.paid_MPG for part in parts], axis=1)
        return cls(parts[0].names, parts[0].weights_M, paid_MPG)

    def means(self) -> dict[str, float]:
        """Returns the mean of each reward, by its name."""
        return {name: float(np.mean(x)) for name, x in zip(self.names, self.paid_MPG, strict=True)}

    def arrays(self, most: int, greedy: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns what `rl.signals.step_signals` takes, of N = most trajectories.

        Those beyond P * G are absent.

        Args:
          greedy: float32 [P], the total reward of the greedy completion of each prompt.
        """
        _, P, G = self.paid_MPG.shape

        def padded(x: np.ndarray) -> np.ndarray:
            flat = x.reshape(*x.shape[:-2], P * G)
            return np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, most - P * G)])

        places_N = np.arange(most, dtype=np.int32)
        arrays = {
            "rewards_MN": padded(self.paid_MPG),
            "weights_M": self.weights_M,
            "outcome_N": padded(self.total_PG),
            "groups_N": places_N // G,
            "present_N": places_N < P * G,
        }
        if greedy is not None:
            arrays["greedy_N"] = padded(np.repeat(greedy[:, None], G, axis=1))
        return arrays


def paid_weights(reinforce: ReinforceConfig, evaluate: EvaluateConfig) -> dict[str, float]:
    """Returns the weights of the rewards of a run, by name.

    Where the order of problems depends on which are solved, the reward that says so is one of them,
    if need be with weight 0.
    """
    judged = {evaluate.reward: 0.0} if reinforce.order != "shuffled" or reinforce.retire_at else {}
    return judged | dict(reinforce.rewards)


def solved(rewards: Rewards, evaluate: EvaluateConfig) -> np.ndarray:
    """Returns which completions solve their problem, bool [P * G]: none where that is not asked."""
    if evaluate.reward not in rewards.names:
        return np.zeros(rewards.paid_MPG[0].size, bool)
    return rewards.of(evaluate.reward).ravel() >= evaluate.success


def reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    weights: Mapping[str, float],
    truncated: str,
    options: Options,
    longest: int,
) -> Rewards:
    """Rewards the N / P completions of each of P problems, one problem after the other.

    Every process computes them; those of the first count, should a reward of one's own draw lots.

    Args:
      weights: reward -> its weight.
      truncated: with "no_reward" those that were cut before their stop token get 0.
      options: the algorithm's; `soft_overlong` adds a reward named `OVERLONG`.
      longest: tokens of the longest completion that can be sampled.
    """
    G = len(completions) // len(problems)
    paid_NM = []
    for row, completion in enumerate(completions):
        parts = dict.fromkeys(weights, 0.0)
        if truncated != "no_reward" or not completion.truncated:
            _, parts = total_reward(completion.text, problems[row // G], weights)
        paid_NM.append([parts[name] for name in weights])
    names, factors = tuple(weights), list(weights.values())
    paid_MN = np.asarray(paid_NM, np.float32).reshape(len(completions), len(names)).T
    if options.soft_overlong:
        lengths_N = np.asarray([completion.length for completion in completions])
        penalty_N = overlong_penalty(lengths_N, longest, options.soft_overlong)
        paid_MN = np.concatenate([paid_MN, penalty_N[None]])
        names, factors = (*names, OVERLONG), [*factors, options.overlong_weight]
    paid_MPG = paid_MN.reshape(len(names), -1, G)
    if jax.process_count() > 1:
        paid_MPG = np.asarray(multihost_utils.broadcast_one_to_all(paid_MPG))
    return Rewards(names, np.asarray(factors, np.float32), paid_MPG)


def overlong_penalty(lengths_N: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """Returns the soft punishment of long completions (DAPO, arXiv 2503.14476, eq. 13).

        0 up to longest - buffer tokens, falling in a line to -1 at longest

    Args:
      lengths_N: tokens that were sampled.

    Returns:
      float32.
    """
    over_N = (lengths_N - (longest - buffer)) / buffer
    return -np.clip(over_N, 0, 1).astype(np.float32)
