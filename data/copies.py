"""Copying exercises: random token sequences, each written twice in a row.

The second time a sequence can be predicted, but only by looking back. A model trained on text is
slow to learn copying (induction heads), because nearby tokens explain so much. A short phase on
sequences that only looking back explains teaches it first (procedural pretraining, arXiv
2601.21725; induction heads form abruptly: arXiv 2209.11895).
"""

import numpy as np

# Tokens of a sequence, both bounds included. Short on purpose: among few candidates the match is
# found sooner. (Without data.cross_document_attention only the exercise itself has candidates.)
MIN_LENGTH, MAX_LENGTH = 4, 20


def copy_exercises(ids: list[int], rng: np.random.Generator, max_tokens: int) -> list[list[int]]:
    """Shuffles a document's tokens, cuts them into spans and repeats each span.

    So a token occurs as often as it does in the text.

    Args:
      ids: the document; fewer than `MIN_LENGTH` tokens make no exercise.
      rng: decides the order, and the lengths of the spans, which are uniform.
      max_tokens: the most tokens of an exercise, those of a row; at least 8.

    Returns:
      The exercises. Fewer than `MIN_LENGTH` tokens are left over and dropped.
    """
    shuffled = rng.permutation(ids).tolist()
    exercises, start = [], 0
    while len(shuffled) - start >= MIN_LENGTH:
        length = rng.integers(MIN_LENGTH, min(MAX_LENGTH, max_tokens // 2) + 1)
        span = shuffled[start : start + length]
        exercises.append(span + span)
        start += len(span)
    return exercises
