"""Rewards by name: each takes a completion and the right answer of its problem, and returns a
number.
"""

from collections.abc import Callable, Mapping

from rl.rewards.answer import answer_reward, format_reward

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {
    "answer": answer_reward,
    "format": lambda text, answer: format_reward(text),
}


def total_reward(
    text: str, answer: str, weights: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The reward of a completion: the weighted sum of the named rewards, and each of them
    unweighted (for the metrics).

    Args:
      weights: reward name -> weight, for example {"answer": 1.0, "format": 0.1}.
    """
    parts = {name: REWARDS[name](text, answer) for name in weights}
    return sum(weights[name] * part for name, part in parts.items()), parts
