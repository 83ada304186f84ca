"""Bits above every token id that say, through the packers, what became of a token's text.

So the share of a batch that is really infilled is counted in the batch itself: exactly, and the
same when a run goes on from a checkpoint, whatever the packers have read ahead. And so a pair,
which is one sequence to the packers, is taken apart behind them.
"""

import numpy as np

INFILLED = 1 << 30  # the token is in a fill-in-the-middle document
PLAIN = 1 << 29  # it is plain, in a text that fill-in-the-middle applies to
REJECTED = 1 << 28  # it is in the conversation of a pair that is not chosen
IDS = REJECTED - 1


def unmarked(tokens: np.ndarray) -> np.ndarray:
    """Returns token ids without their marks."""
    return tokens & IDS


def is_rejected(tokens: np.ndarray) -> np.ndarray:
    """Returns which tokens are in the conversation of a pair that is not chosen, bool."""
    return tokens & REJECTED != 0


def infilled_share(tokens: np.ndarray) -> float | None:
    """Returns the share of the marked tokens that are infilled, or None if none has a mark."""
    infilled, plain = (np.count_nonzero(tokens & mark) for mark in (INFILLED, PLAIN))
    return infilled / (infilled + plain) if infilled + plain else None
