"""Token sequences to rows of a fixed length, by grain's packers, and packed rows to batches.

A batch is a dict of arrays [B, T] (docs/architecture.md):
  tokens     int32     the tokenizer's pad where there is no token
  positions  int32     0, 1, ... inside each segment; 0 for padding
  segments   int32     1, 2, ... inside a row; 0 for padding
  weights    float32   how much predicting this token counts; 0 for padding. Of pairs 1 and -1: a
                       target of the chosen conversation, and of the rejected one
"""

from typing import Any

import grain
import numpy as np

from data.marks import is_rejected, unmarked

# Rows that first-fit fills at the same time, at least: the more, the less padding.
MIN_OPEN_ROWS = 32


def split_rows(sequences: grain.IterDataset, seq_len: int) -> grain.IterDataset:
    """Concatenates sequences {"tokens": [n]} and cuts them every `seq_len` tokens.

    The rest of a sequence opens the next row, as a segment of its own.
    """
    packer = grain.experimental.ConcatThenSplitIterDataset(
        sequences, length_struct={"tokens": seq_len}
    )
    return _ConcatThenSplit(packer)


def fit_rows(
    sequences: grain.IterDataset, seq_len: int, rows: int, seed: int, *, weighted: bool
) -> grain.IterDataset:
    """Puts each sequence, whole, in the first of the open rows that has room for it.

    Args:
      sequences: {"tokens": [n]}, and {"weights": [n]} if `weighted`, with n at most `seq_len`.
      seq_len: tokens of a row.
      rows: rows of a batch; at least as many are open at the same time.
      seed: decides the order in which full rows come out.
      weighted: whether the sequences have weights.
    """
    length = {"tokens": seq_len, "weights": seq_len} if weighted else {"tokens": seq_len}
    return grain.experimental.FirstFitPackIterDataset(
        sequences, length_struct=length, num_packing_bins=max(rows, MIN_OPEN_ROWS), seed=seed
    )


def to_batch(
    packed: dict[str, np.ndarray],
    pad: int,
    *,
    cross_document_attention: bool = False,
    pairs: bool = False,
) -> dict[str, np.ndarray]:
    """Makes a batch of rows that a packer made.

    Args:
      packed: the stacked rows: "tokens" (perhaps with the bits of data/marks.py, which are
        dropped), "tokens_segment_ids", "tokens_positions" and perhaps "weights", [B, T] each.
        Without weights every token has weight 1.
      pad: id to write where there is no token.
      cross_document_attention: makes the tokens of a row one segment, with positions 0 .. T - 1;
        padding stays segment 0.
      pairs: makes two segments of each sequence, that of the chosen conversation of a pair, of an
        odd number, and that of the rejected one, of the next even number.
    """
    segments = packed["tokens_segment_ids"].astype(np.int32)
    positions = packed["tokens_positions"].astype(np.int32)
    is_token = segments > 0
    if cross_document_attention:
        segments = is_token.astype(np.int32)
        positions = np.arange(is_token.shape[1], dtype=np.int32) * segments
    if pairs:
        segments = np.where(is_token, 2 * segments - 1 + is_rejected(packed["tokens"]), 0)
        positions = _positions(segments)
    return {
        "tokens": np.where(is_token, unmarked(packed["tokens"]), pad).astype(np.int32),
        "positions": positions,
        "segments": segments,
        "weights": packed.get("weights", is_token).astype(np.float32),
    }


def _positions(segments: np.ndarray) -> np.ndarray:
    """Returns positions from 0 in each segment, int32 [B, T]; 0 for padding."""
    place = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return (place - first) * (segments > 0)


class _ConcatThenSplit(grain.IterDataset):
    """Lets the state of grain's concat-then-split survive JSON.

    In its state the tuple (-1, -1) says that no remainder of a sequence is left. Read back from
    JSON it is a list, which grain takes for a remainder, and one sequence is lost.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatThenSplitIterator(self._parent.__iter__())


class _ConcatThenSplitIterator(grain.DatasetIterator):
    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {feature: tuple(ends) for feature, ends in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})
