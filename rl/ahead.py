"""Steps whose groups are sampled before the policy that learns from them is there.

With a lag of k, the groups of a step are sampled by the policy of k steps earlier, or by the first
one at the beginning: as if sampler and trainer worked at once, and weights took so long to arrive
(PipelineRL, arXiv 2509.19128; ScaleRL, arXiv 2510.13786, section 3, has k = 8). Which policy
samples what depends on no clock, so such a run is repeated, and resumed, to the bit.
"""

import collections
import functools
from typing import Any

import numpy as np

from checkpoints.cursors import Place
from rl.rollouts import Rollouts, Taken


class Ahead:
    """Takes groups from rollouts `lag` steps ahead. It is the cursor of a run in their place."""

    def __init__(self, rollouts: Rollouts, lag: int):
        self._rollouts, self._lag = rollouts, lag
        self._waiting: collections.deque[Taken] = collections.deque()

    def take(self, step: int, variables: dict) -> Taken:
        """Returns the groups that a step learns from, and samples those of a later one.

        Args:
          step: its number, from 1 on.
          variables: of the policy after the steps before it.
        """
        while len(self._waiting) <= self._lag:
            self._waiting.append(self._rollouts.take(step, variables))
        return self._waiting.popleft()

    def settle(self) -> None:
        """See `Rollouts.settle`."""
        self._rollouts.settle()

    def place(self) -> Place:
        """Returns where it is now, with what waits to be learnt from."""
        if not self._lag:
            return self._rollouts.place()
        below, waiting = self._rollouts.place(), list(self._waiting)
        return Place(functools.partial(self._state, below, waiting))

    def _state(self, below: Place, waiting: list[Taken]) -> dict[str, Any]:
        packed = [[self._rollouts.packed(groups) for groups in taken] for taken in waiting]
        return {"rollouts": below.get_state(), "waiting": packed}

    def get_state(self) -> dict[str, Any]:
        """Returns where it is as JSON."""
        return self.place().get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises UserError as `Rollouts.set_state` does."""
        if not self._lag:
            self._rollouts.set_state(state)
            return
        self._rollouts.set_state(state["rollouts"])
        self._waiting.clear()
        for groups, left_out in state["waiting"]:
            unpacked = self._rollouts.unpacked
            self._waiting.append(Taken(unpacked(groups), unpacked(left_out)))

    def metrics(self, step: int, taken: Taken) -> dict[str, float]:
        """Returns `Rollouts.metrics`, and by how many steps its tokens' policies are older.

        "sampler/staleness_mean", "sampler/staleness_max", and the share of tokens of each age,
        "sampler/staleness_share_N".
        """
        found = self._rollouts.metrics(taken)
        if not (self._lag or self._rollouts.in_parts):
            return found
        completions = [each for group in taken.groups for each in group.completions]
        trajectories = [completion.trajectory for completion in completions]
        ages_N = np.concatenate(
            [step - 1 - each.versions_T[each.sampled_T] for each in trajectories]
        )
        found["sampler/staleness_mean"] = float(np.mean(ages_N))
        found["sampler/staleness_max"] = float(np.max(ages_N))
        for age in range(self._lag + 1) if self._lag else ():
            found[f"sampler/staleness_share_{age}"] = float(np.mean(ages_N == age))
        return found
