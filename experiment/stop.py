"""A command that is asked to stop, by SIGTERM or Ctrl-C, ends soon and says how to go on.

A scheduler tells a run that was stopped from one that is done by the exit code: 143 or 130, as a
shell gives it. A training loop finishes its step and saves (train/interrupt.py); everything else
stops where it is, by an exception. Python raises it between two of its instructions, so a thread
watches over a compilation or a collective operation that does not come to one.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# From the request until a command that does not react is ended.
GRACE_SECONDS = 10


class Stopped(KeyboardInterrupt):
    """The command was asked to stop by this signal, and does."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns SIGTERM and SIGINT into Stopped, as a context manager of the main thread.

    Attributes:
      first: the first of the signals that came, also where a training loop caught it; 0 for none.
    """

    def __init__(self, say: Callable[[int], None]):
        """`say` prints the line of a signal, before a command that does not react is ended."""
        self.first = 0
        self._say = say
        self._handled = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # as in a notebook; signals are another's
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._stop)
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = (read, write)
        self._fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._handled.set()
        os.close(self._pipe[1])  # which ends the thread

    def _stop(self, number: int, _: object) -> None:
        self.first = self.first or number
        self._handled.set()
        raise Stopped(number)

    def _watch(self) -> None:
        """Gets each signal at once, whatever the main thread does."""
        while came := os.read(self._pipe[0], 1):
            number = came[0]
            if number not in self._before:
                continue
            self.first = self.first or number
            # A training loop has a handler of its own in place of ours, and takes its time.
            if signal.getsignal(number) == self._stop and not self._handled.wait(GRACE_SECONDS):
                self._say(number)
                end_now(exit_code(number))  # sys.exit would end this thread alone
        os.close(self._pipe[0])


@contextlib.contextmanager
def output_may_close() -> Iterator[None]:
    """Ends the command quietly where who reads its output goes away, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def exit_code(number: int) -> int:
    """Returns the exit code of a process that a signal stopped."""
    return 128 + (number or signal.SIGTERM)


def end_now(code: int) -> NoReturn:
    """Ends the process without what Python does at its end, but for what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
