"""What rows have been given to read, cut into chunks for `rl.slots.extend`."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rl.request import Row

CHUNKS = (16, 128)  # tokens that are read at a time, by how many a row has to read


class Unread(NamedTuple):
    """A row in a slot whose tokens from `start` on are to be read."""

    slot: int
    row: Row
    start: int

    @property
    def width(self) -> int:
        """The width of the chunk that it reads next, which depends on nothing but itself."""
        left = len(self.row.tokens) - self.start
        return next((width for width in CHUNKS if width >= left), CHUNKS[-1])


class Chunk(NamedTuple):
    """The arguments of `extend` for M rows on each device, and whose they are.

    Attributes:
      slot_M, length_M, tokens_MT, count_M: as `extend` takes them.
      readers_M: the rows that read, None where there is none.
      ready_M: those of them that have read all they had to, and go on sampling.
    """

    slot_M: np.ndarray
    length_M: np.ndarray
    tokens_MT: np.ndarray
    count_M: np.ndarray
    readers_M: list[Row | None]
    ready_M: list[Row | None]


def next_chunk(
    unread: Iterable[Unread], width: int, devices: int, per_device: int, at_once: int, pad: int
) -> tuple[Chunk, collections.deque[Unread]]:
    """Returns the first chunk of this width, and what is left to read after it.

    Args:
      devices, per_device: over which the slots are divided, and how many each has.
      at_once: M, rows that a device reads at a time.
      pad: an id that fills a chunk.
    """
    total = devices * at_once
    slot_M, length_M, count_M = (np.full(total, fill, np.int32) for fill in (per_device, 0, 0))
    tokens_MT = np.full((total, width), pad, np.int32)
    readers_M: list[Row | None] = [None] * total
    ready_M: list[Row | None] = [None] * total
    taken, later = [0] * devices, collections.deque()
    for each in unread:
        slot, row, start = each
        device, local = divmod(slot, per_device)
        if taken[device] == at_once or each.width != width:
            later.append(each)
            continue
        m = device * at_once + taken[device]
        taken[device] += 1
        tokens = row.tokens[start:]
        count = min(len(tokens), width)
        slot_M[m], length_M[m], count_M[m], readers_M[m] = local, start, count, row
        tokens_MT[m, :count] = tokens[:count]
        if count < len(tokens):
            later.append(Unread(slot, row, start + count))
        else:
            ready_M[m] = row
    return Chunk(slot_M, length_M, tokens_MT, count_M, readers_M, ready_M), later
