"""Says how far a long reading of files is, where a person would otherwise wait without a word."""

import sys
import time
from collections.abc import Callable


class Waiting:
    """Prints a line on the standard error every few seconds, the first only after as many."""

    def __init__(self, what: str, every: float = 5.0, clock: Callable[[], float] = time.monotonic):
        """`what` begins each line: "reading the files of ..."."""
        self._what, self._every, self._clock = what, every, clock
        self._said_at = clock()

    def update(self, done: int, unit: str, total: int | None = None) -> None:
        """Notes that `done` units are read, of `total` where that is known."""
        if self._clock() - self._said_at >= self._every:
            self._said_at = self._clock()
            of = "" if total is None else f" of {total:,}"
            print(f"{self._what}: {done:,}{of} {unit}", file=sys.stderr, flush=True)
