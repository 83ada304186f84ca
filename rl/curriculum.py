"""Whose turn is when: the order of a run's problems, by what has been solved so far.

It keeps for each problem how often it was tried and solved, and goes into checkpoints with the
rollouts, so that a run that goes on draws the problems that it would have drawn. What was measured
before the run counts as if the run had tried it, and is no part of the state: it never changes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.tasks.problem import Problem
from errors import UserError
from rl.config import ReinforceConfig
from rl.pass_rates import PassRates
from rl.problems import place_of_draw


class Curriculum:
    """The order of problems, and what is known of each.

    Args:
      problems: of a run.
      config: `order`, and `retire_at`, the pass rate from which a problem is not drawn again.
      draws: groups that the run begins in all, as planned.
      seed: of the order.
      pass_rates: tries of before the run.

    Raises:
      UserError: problems are to come from easy to hard, and nothing says how hard they are.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: ReinforceConfig,
        draws: int,
        seed: int,
        pass_rates: PassRates | None = None,
    ):
        self._problems, self._config = problems, config
        self._draws, self._seed = draws, seed
        self._turn = 0
        self._tried_P = np.zeros(len(problems), np.int64)
        self._solved_P = np.zeros(len(problems), np.int64)
        before = pass_rates or PassRates("", {})
        self._tried_before_P, self._solved_before_P = before.counts(problems)
        self._easy_first_P = None
        if config.order == "easy_first":
            ops_P = np.array([problem.ops for problem in problems])
            rates_P = failure_rates(self.pass_rates, ops_P)
            if np.ptp(ops_P) == 0 == np.ptp(rates_P):
                raise UserError(
                    f"reinforce.order = 'easy_first': no problem of {config.task!r} is harder than "
                    "another by its number of operations (`ops`) or reinforce.pass_rates_from; "
                    "'unsolved' goes by pass rates of the run"
                )
            shuffled_P = np.random.default_rng((seed, 0)).permutation(len(problems))
            by_hardness_P = np.lexsort((ops_P[shuffled_P], rates_P[shuffled_P]))  # it is stable
            self._easy_first_P = shuffled_P[by_hardness_P]

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of each problem's completions that solved it, [P]; NaN where none was tried.

        Those of before the run count too.
        """
        tried_P = self._tried_before_P + self._tried_P
        solved_P = self._solved_before_P + self._solved_P
        return np.where(tried_P, solved_P / np.maximum(tried_P, 1), np.nan)

    @property
    def retired_P(self) -> np.ndarray:
        """Which problems are solved so often that they are not drawn again, bool [P]."""
        if not self._config.retire_at:
            return np.zeros(len(self._problems), bool)
        return np.nan_to_num(self.pass_rates, nan=-1.0) >= self._config.retire_at

    def draw(self) -> int:
        """Returns the place of the problem whose turn it is.

        * shuffled: each in its turn, every time through in another order.
        * easy_first: from the highest to the lowest pass rate that was measured before the run,
          and from the least to the most operations where it is the same or none was, over the
          draws that are planned.
        * unsolved: by lot, each with a chance in proportion to 1 - pass rate; one that was not
          tried, before the run or in it, has 1 (Kimi k1.5, arXiv 2501.12599, section 2.3.5).

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
        """Returns how many problems were tried, their mean pass rate, and how many are retired.

        Problems and tries of before the run count too.
        """
        tried = self._tried_before_P + self._tried_P > 0
        rates_P = self.pass_rates[tried]
        return {
            "curriculum/tried": float(tried.sum()),
            "curriculum/pass_rate": float(rates_P.mean()) if tried.any() else 0.0,
            "curriculum/retired": float(self.retired_P.sum()),
        }

    def get_state(self) -> dict[str, Any]:
        """Returns all that it has learnt in the run, as JSON: problems by their ids."""
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


def failure_rates(pass_rates_P: np.ndarray, ops_P: np.ndarray) -> np.ndarray:
    """Returns 1 - pass rate of each problem, float64 [P].

    One without a rate, NaN, has the mean of those with as many operations, or, where none of these
    has one either, that of all: 0 where nothing was measured.
    """
    known_P = ~np.isnan(pass_rates_P)
    of_all = np.mean(1 - pass_rates_P[known_P]) if known_P.any() else 0.0
    rates_P = np.where(known_P, 1 - pass_rates_P, of_all)
    for ops in np.unique(ops_P[~known_P]):
        alike_P = ops_P == ops
        if (alike_P & known_P).any():
            rates_P[alike_P & ~known_P] = np.mean(1 - pass_rates_P[alike_P & known_P])
    return rates_P
