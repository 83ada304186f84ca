"""Whose turn is when: the order of a run's problems, by what has been solved so far.

It keeps for each problem how often it was tried and solved, and goes into checkpoints with the
rollouts, so that a run that goes on draws the problems that it would have drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.tasks.problem import Problem
from errors import UserError
from rl.config import ReinforceConfig
from rl.problems import place_of_draw


class Curriculum:
    """The order of problems, and what is known of each.

    Args:
      problems: of a run.
      config: `order`, and `retire_at`, the pass rate from which a problem is not drawn again.
      draws: groups that the run begins in all, as planned.
      seed: of the order.

    Raises:
      UserError: problems are to come from easy to hard, and do not say how hard they are.
    """

    def __init__(self, problems: Sequence[Problem], config: ReinforceConfig, draws: int, seed: int):
        self._problems, self._config = problems, config
        self._draws, self._seed = draws, seed
        self._turn = 0
        self._tried_P = np.zeros(len(problems), np.int64)
        self._solved_P = np.zeros(len(problems), np.int64)
        self._easy_first_P = None
        if config.order == "easy_first":
            hardness_P = [problem.ops for problem in problems]
            if min(hardness_P) == max(hardness_P):
                raise UserError(
                    f"reinforce.order = 'easy_first': no problem of {config.task!r} is harder than "
                    "another by its number of operations (`ops`); 'unsolved' goes by pass rates"
                )
            shuffled_P = np.random.default_rng((seed, 0)).permutation(len(problems))
            self._easy_first_P = shuffled_P[
                np.argsort(np.asarray(hardness_P)[shuffled_P], kind="stable")
            ]

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of each problem's completions that solved it, [P]; NaN where none was tried."""
        tried_P = np.where(self._tried_P, self._tried_P, 1)
        return np.where(self._tried_P, self._solved_P / tried_P, np.nan)

    @property
    def retired_P(self) -> np.ndarray:
        """Which problems are solved so often that they are not drawn again, bool [P]."""
        if not self._config.retire_at:
            return np.zeros(len(self._problems), bool)
        return np.nan_to_num(self.pass_rates, nan=-1.0) >= self._config.retire_at

    def draw(self) -> int:
        """Returns the place of the problem whose turn it is.

        * shuffled: each in its turn, every time through in another order.
        * easy_first: from the least to the most operations over the draws that are planned.
        * unsolved: by lot, each with a chance in proportion to 1 - pass rate; one that was not
          tried has 1 (Kimi k1.5, arXiv 2501.12599, section 2.3.5).

        Retired ones are passed over; where all are, none is.
        """
        retired_P = self.retired_P
        if retired_P.all():
            retired_P = np.zeros_like(retired_P)
        if self._config.order == "unsolved":
            weights_P = np.where(retired_P, 0.0, 1 - np.nan_to_num(self.pass_rates, nan=0.0))
            if not weights_P.any():
                weights_P = np.where(retired_P, 0.0, 1.0)
            rng = np.random.default_rng((self._seed, 1, self._turn))
            self._turn += 1
            return int(rng.choice(len(weights_P), p=weights_P / weights_P.sum()))
        count = len(self._problems)
        if self._easy_first_P is not None:
            # The draws that are planned need not come by every problem: the next one that is left.
            first = self._turn * count // max(self._draws, 1) % count
            self._turn += 1
            onward_P = np.roll(self._easy_first_P, -first)
            return int(onward_P[np.argmin(retired_P[onward_P])])
        while True:
            place = place_of_draw(self._turn, count, self._seed)
            self._turn += 1
            if not retired_P[place]:
                return place

    def at(self, turn: int) -> None:
        """Goes to a turn, where the turns before it need not be known."""
        self._turn = turn

    def note(self, place: int, solved: Sequence[bool]) -> None:
        """Takes down which completions of a problem solved it."""
        self._tried_P[place] += len(solved)
        self._solved_P[place] += sum(solved)

    def metrics(self) -> dict[str, float]:
        """Returns how many problems were tried, their mean pass rate, and how many are retired."""
        tried = self._tried_P > 0
        rates_P = self.pass_rates[tried]
        return {
            "curriculum/tried": float(tried.sum()),
            "curriculum/pass_rate": float(rates_P.mean()) if tried.any() else 0.0,
            "curriculum/retired": float(self.retired_P.sum()),
        }

    def get_state(self) -> dict[str, Any]:
        """Returns all that it knows, as JSON: problems by their ids."""
        known = {
            problem.id: [int(tried), int(solved)]
            for problem, tried, solved in zip(
                self._problems, self._tried_P, self._solved_P, strict=True
            )
            if tried
        }
        return {"turn": self._turn, "tried_and_solved": known}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state. What it says of problems that are no longer there is left out."""
        self._turn = state["turn"]
        known = state["tried_and_solved"]
        for place, problem in enumerate(self._problems):
            self._tried_P[place], self._solved_P[place] = known.get(problem.id, (0, 0))
