"""Rewards by name.

Each takes the text of a completion and the right answer of its problem, and returns a number. A new
reward is a function in a file here and an entry in `REWARDS`. It may import `data` (parsing) and
nothing of the trainer. Start reading at `rl/rewards/answer.py`.
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
    """Rewards a completion.

    Args:
      weights: reward name -> weight, for example {"answer": 1.0, "format": 0.1}.

    Returns:
      The weighted sum of the named rewards, and each of them unweighted, for the metrics.
    """
    by_name = {name: REWARDS[name](text, answer) for name in weights}
    return sum(weights[name] * reward for name, reward in by_name.items()), by_name
