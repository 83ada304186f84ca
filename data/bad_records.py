"""What becomes of records that cannot be read or encoded, and how many a run has met.

With data.bad_records = "skip" such a record gives no tokens and is counted. The counts are part of
the cursor, so they go on with the run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from data.documents import SKIPPING, BadRecord, Document
from errors import UserError, shortened

FIRST = 3  # bad records of which a run says where they are and what is wrong
WORDS = 300  # characters of what it says of each

Encoder = Callable[[tuple[str, Document], np.random.Generator], list[dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a stream has met in its documents so far.

    Attributes:
      skipped: bad records.
      replaced: surrogates without their other half, which U+FFFD stands for.
      first: where the first bad records are, and what is wrong with each.
    """

    skipped: int = 0
    replaced: int = 0
    first: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.skipped or self.replaced)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The sequences of one document; `error` says what is wrong with a bad record."""

    sequences: list[dict[str, np.ndarray]]
    replaced: int = 0
    error: str = ""


class RecordEncoder:
    """Encodes documents, and makes nothing of bad records, if they are skipped."""

    def __init__(self, encode: Encoder, *, skips: bool):
        self._encode, self._skips = encode, skips

    def __call__(
        self, element: tuple[str, Document | BadRecord], rng: np.random.Generator
    ) -> Encoded:
        """Encodes one document. Raises UserError if it cannot be and is not skipped."""
        kind, document = element
        if isinstance(document, BadRecord):
            return Encoded([], error=str(document))
        try:
            return Encoded(self._encode((kind, document), rng), document.replaced)
        except UserError as error:
            if self._skips:
                return Encoded([], error=str(error))
            if isinstance(error, BadRecord):
                raise BadRecord(f"{error} ({SKIPPING})") from error
            raise


class CountedSequences(grain.IterDataset):
    """The sequences of each document of a parent of `Encoded`, counted on the way.

    Its last iterator is `iterator`, which has the `counts`.
    """

    def __init__(self, parent: grain.IterDataset, patience: int):
        """Gives up after `patience` documents in a row without a token."""
        super().__init__(parent)
        self._patience = patience
        self.iterator: _CountedIterator | None = None

    def __iter__(self) -> grain.DatasetIterator:
        self.iterator = _CountedIterator(self._parent.__iter__(), self._patience)
        return self.iterator


class _CountedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, patience: int):
        super().__init__(parent)
        self._patience, self._empty = patience, 0
        self.counts = Counts()

    def __next__(self) -> list[dict[str, np.ndarray]]:
        encoded: Encoded = next(self._parent)
        if encoded.error or encoded.replaced:
            self.counts = _with(self.counts, encoded)
        self._empty = 0 if encoded.sequences else self._empty + 1
        if self._empty >= self._patience:
            first = f"; the first bad record: {self.counts.first[0]}" if self.counts.first else ""
            raise UserError(f"data.sources: no document gives a token{first}")
        return encoded.sequences

    def get_state(self) -> dict[str, Any]:
        """Returns the parent's state, with the counts as soon as there are any."""
        state = self._parent.get_state()
        return {**state, "counts": dataclasses.asdict(self.counts)} if self.counts else state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that may be from JSON."""
        counts: dict[str, Any] = state.get("counts", {})
        self.counts = Counts(**{**counts, "first": tuple(counts.get("first", ()))})
        self._empty = 0
        self._parent.set_state({name: state[name] for name in state if name != "counts"})


def _with(counts: Counts, encoded: Encoded) -> Counts:
    """Returns the counts with those of one document more."""
    if not encoded.error:
        return dataclasses.replace(counts, replaced=counts.replaced + encoded.replaced)
    first = (*counts.first, shortened(encoded.error, WORDS))[:FIRST]
    return dataclasses.replace(counts, skipped=counts.skipped + 1, first=first)
