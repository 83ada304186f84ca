"""What an engine has to do at a moment: the rows in its slots, and those that wait for one."""

import collections
import dataclasses
import itertools

from jax import Array

from model.cache import Cache
from rl.request import Row, read_together
from rl.slots import Slots
from rl.turns import Unread


@dataclasses.dataclass
class Reading:
    """Prompts that have been read, and the rows of each device that wait for a slot.

    A row stands beside the number of its prompt among those of its device.
    """

    prompts: tuple[Cache, Array]  # the first two that `read_prompts` returns
    waiting: list[collections.deque[tuple[int, Row]]]

    def serves(self, idle: list[list[int]]) -> bool:
        """Tells whether any device has both an idle slot and a row that waits."""
        return any(map(min, zip(map(len, self.waiting), map(len, idle), strict=True)))


@dataclasses.dataclass
class Work:
    """What there is to do.

    Attributes:
      occupants: the row in each slot, or None.
      slots: what the devices hold of them; None before the first step.
      waiting: rows whose tokens are not read yet; those of a group are read once for all.
      readings: prompts that are read, and their rows.
      unread: what rows in slots have been given to read.
      stale: slots that are live on the devices though their row has halted.
    """

    occupants: list[Row | None]
    slots: Slots | None = None
    waiting: collections.deque[list[Row]] = dataclasses.field(default_factory=collections.deque)
    readings: list[Reading] = dataclasses.field(default_factory=list)
    unread: collections.deque[Unread] = dataclasses.field(default_factory=collections.deque)
    stale: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def none(cls, slots: int) -> "Work":
        """Returns that of an engine with so many slots of which nothing is asked."""
        return cls([None] * slots)

    @property
    def waits(self) -> bool:
        """Whether any row waits for a slot."""
        return bool(self.waiting) or any(any(each.waiting) for each in self.readings)

    @property
    def rows(self) -> list[Row]:
        """All rows: those in slots first, then those whose prompt is read, then the others."""
        read = [row for each in self.readings for rows in each.waiting for _, row in rows]
        return [*filter(None, self.occupants), *read, *itertools.chain(*self.waiting)]

    def to_read_again(self) -> "Work":
        """Returns the same rows, of which all wait and nothing is read; the slots are let go of."""
        again = Work.none(len(self.occupants))
        again.waiting.extend(read_together(self.rows))
        return again
