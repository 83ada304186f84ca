"""How long each part of a step takes.

JAX returns before a device has computed, so the seconds of a part are those of its own work only if
it waits for that at its end: `Parts.until` does. What a part leaves running would be counted in the
next one that waits.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


class Parts:
    """The seconds of each part of a step.

        parts.begin()
        with parts("gen"):
            ...
            with parts("reward"):
                ...
        with parts("update_actor"):
            state = parts.until(step(state))
        metrics = parts.collect()

    While a part is within another, its seconds are its own alone; so those of one thread add to no
    more than the step took. Threads may have parts at once, even of one name.

    Args:
      clock: returns seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._begun: float | None = None
        self._threads = threading.local()

    def begin(self) -> None:
        """Begins a step: what was measured and not collected is forgotten."""
        with self._lock:
            self._seconds.clear()
            self._begun = self._clock()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what is inside as a part of this name, however it ends."""
        stack = self._stack()
        if stack:
            self._count(stack)
        stack.append((name, self._clock()))
        try:
            yield
        finally:
            self._count(stack)
            stack.pop()
            if stack:
                stack[-1] = stack[-1][0], self._clock()

    def until(self, values: T) -> T:
        """Waits for the arrays of a tree to be computed, and returns it."""
        return jax.block_until_ready(values)

    def collect(self, *names: str) -> dict[str, float]:
        """Returns "timing_s/NAME" of the parts that were measured, and forgets them.

        Args:
          names: of some parts. Without any it is all of them, and "step_time", the seconds since
            the step began.
        """
        with self._lock:
            taken = list(names or self._seconds)
            found = {f"timing_s/{name}": self._seconds.pop(name, 0.0) for name in taken}
            if not names and self._begun is not None:
                found["step_time"] = self._clock() - self._begun
        return found

    def _stack(self) -> list[tuple[str, float]]:
        """Returns the parts that this thread is in, the innermost last, and since when."""
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        return self._threads.stack

    def _count(self, stack: list[tuple[str, float]]) -> None:
        name, since = stack[-1]
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - since
