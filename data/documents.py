"""What every source gives: documents by index, each with a name that decides, by hash, whether it
is trained on or held out.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from errors import UserError

Split = Literal["train", "validation"]
Messages = list[
    dict[str, Any]
    # each with a "role", and whatever else its template reads: "content", "reasoning_content",
    # "tool_calls" ...
]
Tools = list[dict[str, Any]]  # JSON schemas of what the assistant may call


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one that is too long.

    Attributes:
      name: where it is from, for people.
      body: text, or the messages of a conversation.
      begins: whether its first character is the document's first.
      ends: whether its last is the document's last.
      tools: what the assistant of a conversation may call, if anything.
    """

    name: str
    body: str | Messages
    begins: bool = True
    ends: bool = True
    tools: Tools | None = None


class Source(Protocol):
    """Documents by index, in an order that never changes.

    Attributes:
      spec: the string it was opened from.
      kind: the part before the colon.
      validation_share: share held out whatever the config says, or None to take the config's.
    """

    spec: str
    kind: str
    validation_share: float | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def key(self, index: int) -> str:
        """What is hashed to decide the split: pieces with the same key stay together."""
        ...


class Subset(Sequence[Document]):
    """The documents of a source that are in one split."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source = source
        self._indices = np.asarray(
            indices, np.int64
        )  # a list of Python integers would weigh four times as much

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[int(self._indices[index])]

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __repr__(
        self,
    ) -> str:  # grain prints it; short, and without an address, so that it is the same in every run
        return f"Subset({self.source.spec!r}, {len(self)} documents)"


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: not on the process, the machine or the
    Python version.
    """
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
    )  # 48 bits: exact in a float


def select_split(source: Source, split: Split, validation: float) -> Subset:
    """The documents of `source` whose key hashes into `split`.

    Raises UserError if there is none.
    """
    if split not in get_args(Split):
        raise ValueError(f"split = {split!r}: must be one of {get_args(Split)}")
    share = validation if source.validation_share is None else source.validation_share
    indices = [
        index
        for index in range(len(source))
        if (uniform_hash(source.key(index)) < share) == (split == "validation")
    ]
    if not indices:
        held = (
            f"data.validation = {share}"
            if source.validation_share is None
            else f"its held-out share of {share}"
        )
        raise UserError(
            f'data.sources: "{source.spec}" has {len(source)} documents, and {held} leaves none for {split}'
        )
    return Subset(source, indices)
