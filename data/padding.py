"""Rows of different lengths, padded to one rectangular array."""

from collections.abc import Sequence
from typing import Literal

import numpy as np


def pad_rows(
    rows: Sequence[Sequence[int]],
    width: int,
    pad: int,
    *,
    side: Literal["left", "right"] = "right",
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids to `width`, as a tokenizer's `padding_side` does.

    Args:
      rows: B rows of ids, each at most `width` long; a row may be empty.
      width: tokens of a padded row, T.
      pad: id that fills the rest of a row.
      side: where the padding goes: "right" for scoring and training, "left" for generation.

    Returns:
      (tokens_BT, segments_BT), int32: the ids, and 1 on each of them, 0 on padding.

    Raises:
      ValueError: a row is longer than `width`.
    """
    tokens_BT = np.full((len(rows), width), pad, np.int32)
    segments_BT = np.zeros((len(rows), width), np.int32)
    for number, ids in enumerate(rows):
        if len(ids) > width:
            raise ValueError(f"row {number} has {len(ids)} tokens, more than the width {width}")
        start = width - len(ids) if side == "left" else 0
        tokens_BT[number, start : start + len(ids)] = ids
        segments_BT[number, start : start + len(ids)] = 1
    return tokens_BT, segments_BT
