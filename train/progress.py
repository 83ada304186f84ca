"""Shows how far a run is: a bar on a terminal, a plain line every few seconds in a log."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

WINDOW = 50  # updates the speed is measured over
# Seconds within which updates count as one. Many may come at once, of completions that ended
# together, and a window of them alone would span no time.
AT_ONCE = 0.1


@contextlib.contextmanager
def timed_line(what: str) -> Iterator[None]:
    """Prints what is being done, and when it is done how long it took; on process 0 alone."""
    if jax.process_index() == 0:
        print(f"{what} ...", flush=True)
    begun = time.monotonic()
    yield
    if jax.process_index() == 0:
        print(f"{what} took {time.monotonic() - begun:.1f} s", flush=True)


class Progress:
    """Shows step, values, speed and time left, as a context manager.

    On processes other than the first it only measures.

    Args:
      total: steps of the run.
      label: its name.
      unit: what the speed counts.
      every: seconds between two lines where there is no terminal.
      console: where they are printed; the standard output by default.
      clock: returns seconds, from any origin.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "tokens",
        every: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.label, self.unit = total, escape(label), unit
        self._console = console or Console()
        self._clock = clock
        # (time, step, units) of each update, or of those at once; and when the last one began.
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=WINDOW + 1)
        self._begun = -math.inf
        self._at_once = 0.0, 0  # seconds and units since the first of the last ones at once
        self._shown_at = -every
        self._first = jax.process_index() == 0
        self._bar = None
        if self._first and self._console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(self.label, total=total, text="compiling")
        self._every = 0.2 if self._bar else every

    def update(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Notes that `step` is done, and shows it if the last line is old enough.

        Args:
          step: steps done, of total.
          values: name -> number to show. Arrays are fetched from the device only when they are
            shown.
          tokens: units done since the last update.
        """
        now = self._clock()
        if now - self._begun < AT_ONCE:
            self._at_once = now - self._begun, self._at_once[1] + tokens
            tokens += self._recent.pop()[2]
        else:
            self._begun, self._at_once = now, (0.0, 0)
        self._recent.append((now, step, tokens))
        if not self._first or (now - self._shown_at < self._every and step != self.total):
            return
        self._shown_at = now
        text = "  ".join(
            [f"{name} {float(value):.4g}" for name, value in values.items()] + self._speed()
        )
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self._console.print(
                f"{self.label} {step}/{self.total}  {text}", highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._first:
            self._console.print(f"{self.label}  {escape(text)}", highlight=False, soft_wrap=True)

    @property
    def tokens_per_s(self) -> float:
        """The speed over the last updates, in units per second.

        The first step compiles, so the clock starts when it is done: it is 0 until a later one is.
        """
        if len(self._recent) > 1:
            return self._recent_speed
        # All of a run that is over at once.
        seconds, tokens = self._at_once
        return tokens / seconds if seconds else 0.0

    @property
    def _recent_speed(self) -> float:
        start, *later = self._recent or [(0.0, 0, 0)]
        return sum(tokens for _, _, tokens in later) / (later[-1][0] - start[0]) if later else 0.0

    def _speed(self) -> list[str]:
        if not self._recent_speed:
            return []
        (start, first, _), (now, step, _) = self._recent[0], self._recent[-1]
        left = timedelta(seconds=round((self.total - step) * (now - start) / max(step - first, 1)))
        return [f"{self._recent_speed:,.0f} {self.unit}/s", f"{left} left"]

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()
