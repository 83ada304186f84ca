"""Documents to rows of a fixed length, by grain's packers, and packed rows to batches.

A batch is a dict of arrays [B, T] (docs/architecture.md):
  tokens     int32     padding is the tokenizer's pad
  positions  int32     0, 1, ... inside each segment
  segments   int32     1, 2, ... inside a row; 0 is padding
  weights    float32   how much predicting this token counts; 0 for padding
"""

from typing import Any

import grain
import numpy as np

# Rows that first-fit fills at the same time, at least: the more, the less padding.
FIT_ROWS = 32


def split_rows(documents: grain.IterDataset, sequence: int) -> grain.IterDataset:
    """Documents {"tokens": [n]} one behind the other, cut every `sequence` tokens; the rest of a
    document opens the next row, as a segment of its own.
    """
    return _ConcatThenSplit(
        grain.experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": sequence})
    )


def fit_rows(
    documents: grain.IterDataset, sequence: int, rows: int, seed: int, *, weighted: bool
) -> grain.IterDataset:
    """Documents {"tokens": [n], and "weights": [n] if weighted}, none longer than `sequence`, each
    whole, in the first of the open rows that has room.
    """
    length = {"tokens": sequence, "weights": sequence} if weighted else {"tokens": sequence}
    return grain.experimental.FirstFitPackIterDataset(
        documents, length_struct=length, num_packing_bins=max(rows, FIT_ROWS), seed=seed
    )


def to_batch(
    packed: dict[str, np.ndarray], pad: int, *, cross_document_attention: bool
) -> dict[str, np.ndarray]:
    """Rows of a packer, already stacked, as a batch.

    Args:
      packed: "tokens", "tokens_segment_ids", "tokens_positions" and perhaps "weights", [B, T].
      pad: id for the positions of segment 0.
      cross_document_attention: the row becomes one segment, positions 0 .. T - 1; padding stays
        segment 0.
    """
    segments = packed["tokens_segment_ids"].astype(np.int32)
    positions = packed["tokens_positions"].astype(np.int32)
    real = segments > 0
    if cross_document_attention:
        segments = real.astype(np.int32)
        positions = np.broadcast_to(np.arange(real.shape[1], dtype=np.int32), real.shape) * segments
    return {
        "tokens": np.where(real, packed["tokens"], pad).astype(np.int32),
        "positions": positions,
        "segments": segments,
        "weights": packed.get("weights", real).astype(np.float32),
    }


class _ConcatThenSplit(grain.IterDataset):
    """Lets the state of grain's concat-then-split survive JSON.

    Its state marks "no rest of a document" by the tuple (-1, -1); read back from JSON that is a
    list, which grain takes for a rest, and one document is lost.
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
