"""Copying exercises: meaningless sequences of tokens, each of which stands twice.

The second time a sequence can be predicted, but only by looking back. A model trained on text
learns to look back late, since the last few tokens explain so much. A short time on text that only
looking back explains teaches it first (procedural pretraining, arXiv 2601.21725; that copying is a
circuit of its own, learnt at once: arXiv 2209.11895).
"""

import numpy as np

# Tokens of a sequence, both bounds included. They are few: among few tokens the right one is soon
# found by chance, and finding it is what is to be learnt.
MIN_LENGTH, MAX_LENGTH = 4, 20


def copy_exercises(ids: list[int], rng: np.random.Generator, max_tokens: int) -> list[list[int]]:
    """Makes a document into exercises: its tokens in random order, cut, each part written twice.

    So a token comes up as often as it does in the text.

    Args:
      ids: the document; fewer than `MIN_LENGTH` tokens make no exercise.
      rng: decides the order and the lengths, which are uniform.
      max_tokens: tokens that an exercise may have, those of a row; at least 8.

    Returns:
      The exercises. Fewer than `MIN_LENGTH` tokens are left over and dropped.
    """
    shuffled = rng.permutation(ids).tolist()
    exercises, start = [], 0
    while len(shuffled) - start >= MIN_LENGTH:
        length = rng.integers(MIN_LENGTH, min(MAX_LENGTH, max_tokens // 2) + 1)
        sequence = shuffled[start : start + length]
        exercises.append(sequence + sequence)
        start += len(sequence)
    return exercises
