"""What completions earn: each reward by its name, and the sum that is maximised."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.tasks.problem import Problem
from rl.algorithms.options import Options
from rl.config import ReinforceConfig
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


def reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    config: ReinforceConfig,
    options: Options,
    longest: int,
    group_size: int | None = None,
) -> Rewards:
    """Rewards P * G completions, of which row p * G + g answers problem p.

    Those that were cut before their stop token get 0 where reinforce.truncated says so. Every
    process computes them; those of the first count, should a reward of one's own draw lots.

    Args:
      options: the algorithm's; `soft_overlong` adds a reward named `OVERLONG`.
      longest: tokens of the longest completion that can be sampled.
      group_size: G; None takes reinforce.group_size.
    """
    G = group_size or config.group_size
    paid_NM = []
    for row, completion in enumerate(completions):
        parts = dict.fromkeys(config.rewards, 0.0)
        if config.truncated != "no_reward" or not completion.truncated:
            _, parts = total_reward(completion.text, problems[row // G], config.rewards)
        paid_NM.append([parts[name] for name in config.rewards])
    names, weights = tuple(config.rewards), list(config.rewards.values())
    paid_MN = np.asarray(paid_NM, np.float32).reshape(len(completions), len(names)).T
    if options.soft_overlong:
        lengths_N = np.asarray([completion.length for completion in completions])
        penalty_N = overlong_penalty(lengths_N, longest, options.soft_overlong)
        paid_MN = np.concatenate([paid_MN, penalty_N[None]])
        names, weights = (*names, OVERLONG), [*weights, options.overlong_weight]
    paid_MPG = paid_MN.reshape(len(names), -1, G)
    if jax.process_count() > 1:
        paid_MPG = np.asarray(multihost_utils.broadcast_one_to_all(paid_MPG))
    return Rewards(names, np.asarray(weights, np.float32), paid_MPG)


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
