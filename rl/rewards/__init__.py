"""Rewards by name.

Each takes the text of a completion and its problem, and returns a number. A new reward is a
function in a file here and an entry in `REWARDS`, or a function in any Python file, named
`FILE.py:NAME`. The package may import `data` (parsing, problems) and nothing of the trainer. Start
reading at `rl/rewards/answer.py`.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from data.python_files import errors_in, is_attribute, load_attribute
from data.tasks.problem import Problem
from errors import UserError
from rl.rewards.answer import answer_reward, format_reward

Reward = Callable[[str, Problem], float]

REWARDS: dict[str, Reward] = {
    "answer": lambda text, problem: answer_reward(text, problem.answer),
    "format": lambda text, problem: format_reward(text),
}


def check_weights(weights: Mapping[str, float], field: str = "reinforce.rewards") -> None:
    """Checks the names and weights of rewards, without running anyone's file.

    Raises:
      UserError: there is none, one of no such name, two that metrics would call the same, or a
        weight that is not finite; names the field.
    """
    if not weights:
        raise UserError(f"{field} = {{}}: must name at least one reward, such as 'answer'")
    for name, weight in weights.items():
        if name not in REWARDS and not is_attribute(name):
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"{field}: no reward {name!r} ({hint}there are {', '.join(REWARDS)}, and "
                "FILE.py:NAME, a function of your own)"
            )
        if not math.isfinite(weight):
            raise UserError(f"{field}: the weight of {name!r} = {weight}: must be finite")
    names = [metric_name(name) for name in weights]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{field}: two rewards would be {twice!r} in the metrics; rename one")


def metric_name(name: str) -> str:
    """Returns what metrics call a reward: rewards/answer, or rewards/brevity of FILE.py:brevity."""
    return f"rewards/{name.rpartition(':')[2]}"


@functools.cache
def get_reward(name: str) -> Reward:
    """Returns a reward by name; one of a file is checked at each call.

    Raises:
      UserError: the file fails or has no such function; or in a call of the reward, it raises, or
        what it returns is not a finite number.
    """
    if name in REWARDS:
        return REWARDS[name]
    function, path = load_attribute(name), name.rpartition(":")[0]
    if not callable(function):
        raise UserError(f"{name}: is a {type(function).__name__}, not a function")

    def checked(text: str, problem: Problem) -> float:
        with errors_in(path, f" (reward {name}, problem {problem.id})"):
            found: Any = function(text, problem)
            value = float(found) if hasattr(found, "__float__") else math.nan
        if not math.isfinite(value):
            raise UserError(
                f"{name}: returned {found!r:.60} for problem {problem.id}; "
                "a reward is a finite number"
            )
        return value

    return checked


def get_rewards(names: Iterable[str]) -> None:
    """Runs the files of a person's own rewards, once. Raises as `get_reward` does."""
    for name in names:
        get_reward(name)


def total_reward(
    text: str, problem: Problem, weights: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Rewards a completion.

    Args:
      weights: reward name -> weight, for example {"answer": 1.0, "format": 0.1}.

    Returns:
      The weighted sum of the named rewards, and each of them unweighted, for the metrics.
    """
    by_name = {name: get_reward(name)(text, problem) for name in weights}
    return sum(weights[name] * reward for name, reward in by_name.items()), by_name
