"""Copying exercises: meaningless runs of tokens, each of which stands twice. The second time it can
be predicted, but only by looking back.

A model trained on text learns to look back late, since the last few tokens explain so much. A short
time on text that only looking back explains teaches it first (procedural pretraining, arXiv
2601.21725; that copying is a circuit of its own, learnt at once: arXiv 2209.11895).
"""

import numpy as np

# Tokens of a run. Short: among few tokens the right one is soon found by chance, and finding it is
# what is to be learnt.
SHORTEST, LONGEST = 4, 20


def copy_exercises(ids: list[int], rng: np.random.Generator, longest: int) -> list[list[int]]:
    """A document's tokens in random order, cut into runs of SHORTEST to LONGEST, each written
    twice: one exercise a run.

    Args:
      ids: the document; fewer than SHORTEST tokens make no exercise. So a token comes up as often
        as it does in the text.
      longest: tokens an exercise may have, its row; at least 8.
    """
    shuffled = rng.permutation(ids).tolist()
    exercises, start = [], 0
    while len(shuffled) - start >= SHORTEST:
        run = shuffled[start : start + rng.integers(SHORTEST, min(LONGEST, longest // 2) + 1)]
        exercises.append(run + run)
        start += len(run)
    return exercises
