"""Batches one by one, with what their documents were, made ahead of time."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from data.bad_records import CountedSequences, Counts
from data.marks import infilled_share
from data.packing import to_batch
from data.prefetch import Prefetch

PREFETCH_BATCHES = 4


class BatchStream(grain.DatasetIterator):
    """An iterator of batches; `counts` and `fim_share` are those of the last one taken.

    Attributes:
      counts: what the stream had met in its documents when that batch was made.
      fim_share: share of the batch's tokens that are in fill-in-the-middle documents, of those of
        texts that it applies to; None if there are none.
    """

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        self.counts, self.fim_share, self._told = Counts(), None, 0

    def __next__(self) -> dict[str, np.ndarray]:
        batch, self.counts, self.fim_share = next(self._parent)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the last batch taken, as plain JSON."""
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a place; the next batch is exactly that which would have come."""
        self._parent.set_state(state)

    def news(self) -> tuple[str, ...]:
        """Returns those of the first bad records that it has not returned yet."""
        first, self._told = self.counts.first[self._told :], len(self.counts.first)
        return first

    def metrics(self) -> dict[str, np.generic]:
        """Returns what metrics.jsonl says of the last batch, and of the stream up to it."""
        found: dict[str, np.generic] = {}
        if self.fim_share is not None:
            found["fim_share"] = np.float32(self.fim_share)
        if self.counts:
            found["bad_records"] = np.int64(self.counts.skipped)
            found["replaced_characters"] = np.int64(self.counts.replaced)
        return found


class Batches(grain.IterDataset):
    """Rows of `Encoded` documents, by batches."""

    def __init__(
        self,
        encoded: grain.IterDataset,
        rows_of: Callable[[grain.IterDataset], grain.IterDataset],
        *,
        batch_rows: int,
        patience: int,
        pad: int,
        cross_document_attention: bool,
        pairs: bool,
    ):
        """Makes batches of `batch_rows` rows, which `rows_of` packs.

        Args:
          encoded: documents, `data.bad_records.Encoded`.
          rows_of: packs sequences into rows.
          batch_rows: rows of a batch.
          patience: documents in a row without a token after which there is none.
          pad: id to write where there is no token.
          cross_document_attention: makes the tokens of a row one segment.
          pairs: takes each sequence apart, into the two conversations of a pair.
        """
        super().__init__(encoded)
        self._encoded = encoded
        self._rows_of, self._batch_rows, self._patience = rows_of, batch_rows, patience
        self._pad, self._crossing, self._pairs = pad, cross_document_attention, pairs

    def __iter__(self) -> BatchStream:
        """Opens a stream: its counts are its own, so its datasets are made here."""
        counted = CountedSequences(self._encoded, self._patience)
        rows = self._rows_of(grain.experimental.FlatMapIterDataset(counted, _Flatten()))
        count = self._batch_rows
        packed = rows.batch(
            count,
            batch_fn=lambda values: grain.experimental.batch_and_pad(values, batch_size=count),
        )
        finished = packed.map(lambda batch: self._finish(batch, counted))
        return BatchStream(iter(Prefetch(finished, PREFETCH_BATCHES)))

    def _finish(self, packed: dict[str, np.ndarray], counted: CountedSequences) -> tuple:
        """Returns what `BatchStream` takes apart."""
        assert counted.iterator is not None, "the batch came from it"
        share = infilled_share(packed["tokens"])
        batch = to_batch(
            packed, self._pad, cross_document_attention=self._crossing, pairs=self._pairs
        )
        return batch, counted.iterator.counts, share


class _Flatten(grain.experimental.FlatMapTransform):
    """Gives the sequences of each document one by one."""

    max_fan_out = 1  # an IterDataset ignores it

    def flat_map(self, element: list) -> list:
        return element
