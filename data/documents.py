"""Documents, the sources that give them, and the split into training and validation.

A source names each of its documents by a key; the hash of the key decides the split. So a document
is in the same split in every run, on every machine, whatever else is trained on.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from data.waiting import Waiting
from errors import UserError

Split = Literal["train", "validation"]

# A conversation: each message has a "role", and whatever else its chat template reads, such as
# "content", "reasoning_content" or "tool_calls".
Messages = list[dict[str, Any]]

# JSON schemas of the functions that the assistant may call.
Tools = list[dict[str, Any]]


# What a person may do about a bad record, besides mending it.
SKIPPING = 'data.bad_records = "skip" goes on without it'


class BadRecord(UserError):
    """One document that cannot be read or encoded, of a file that can be.

    `data.bad_records` says whether the run stops there.
    """


@dataclass(frozen=True)
class Document:
    """One document, or a chunk of one that is too long.

    Attributes:
      name: its file and place in it, for error messages.
      body: text, or the messages of a conversation; of a pair, of that which is chosen.
      begins: true unless `body` is a chunk that begins inside the document.
      ends: true unless `body` is a chunk that ends inside the document.
      tools: functions that the assistant of a conversation may call, or None.
      replaced: characters of the record that are U+FFFD here, being no characters: surrogates
        without their other half.
      rejected: of a pair, the messages of the conversation that is not chosen; else None.
    """

    name: str
    body: str | Messages
    begins: bool = True
    ends: bool = True
    tools: Tools | None = None
    replaced: int = 0
    rejected: Messages | None = None


class Source(Protocol):
    """Documents by index, in an order that never changes.

    Attributes:
      spec: the string it was opened from.
      kind: the part of `spec` before the colon.
      validation_share: share of the documents that is for validation whatever the config says, or
        None to take the config's.
    """

    spec: str
    kind: str
    validation_share: float | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def key(self, index: int) -> str:
        """Returns the text whose hash decides the split; chunks of one document share it."""
        ...


@runtime_checkable
class OwnSplit(Protocol):
    """A source that decides itself which of its documents are in which split."""

    def in_split(self, split: Split) -> Sequence[int]:
        """Returns the indices of the documents of a split."""
        ...


class Subset(Sequence[Document]):
    """The documents of a source that are in one split."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source = source
        # A list of Python integers would take four times as much memory.
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[int(self._indices[index])]

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        # grain prints it: short, and without an address, so that it is the same in every run.
        return f"Subset({self.source.spec!r}, {len(self)} documents)"


class ReadableDocuments(Sequence[Document | BadRecord]):
    """Documents by index; one that cannot be read is a `BadRecord`, if they are skipped."""

    def __init__(self, documents: Sequence[Document], *, skips: bool):
        self._documents, self._skips = documents, skips

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document | BadRecord:
        """Reads one. Raises BadRecord if none is skipped."""
        try:
            return self._documents[index]
        except BadRecord as error:
            if not self._skips:
                raise BadRecord(f"{error} ({SKIPPING})") from error
            return error

    def __repr__(self) -> str:
        return repr(self._documents)


def uniform_hash(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone.

    It is the same in every process, on every machine and for every version of Python. A name of a
    file that is not UTF-8 counts with its own bytes.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # 48 bits are exact in a float


def select_split(source: Source, split: Split, validation_share: float) -> Subset:
    """Selects the documents of a source whose key hashes into `split`.

    Args:
      source: the source to select from.
      split: "train" or "validation".
      validation_share: share of the documents that is for validation, unless the source fixes its
        own.

    Raises:
      UserError: no document is in the split.
      ValueError: there is no such split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split = {split!r}: must be one of {get_args(Split)}")
    share = validation_share if source.validation_share is None else source.validation_share
    if isinstance(source, OwnSplit):
        indices = source.in_split(split)
    else:
        indices, waiting = [], Waiting(f"splitting {source.spec}")
        for index in range(len(source)):
            if (uniform_hash(source.key(index)) < share) == (split == "validation"):
                indices.append(index)
            if index % 4096 == 0:
                waiting.update(index, "documents", len(source))
    if not indices:
        reason = (
            f"data.validation = {share}"
            if source.validation_share is None
            else f"its validation share of {share}"
        )
        raise UserError(
            f'data.sources: "{source.spec}" has {len(source)} documents, and {reason} leaves none '
            f"for {split}"
        )
    return Subset(source, indices)
