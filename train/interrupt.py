"""A run that is asked to stop (by a scheduler's SIGTERM or Ctrl-C) finishes its step and saves."""

import ctypes
import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

# What the operating system does at SIGTERM in JAX's name, as sigaction(2) describes it; Python
# cannot name a handler that is not its own. A struct sigaction is shorter.
_of_jax: list[ctypes.Array] = []


def keep_handler_of_jax() -> None:
    """Remembers JAX's handler of SIGTERM, which `jax.distributed.initialize` has just installed.

    By it a process tells the others to stop after the same step. Python's handlers may then take
    its place where nothing waits for that step.
    """
    action = ctypes.create_string_buffer(1_024)
    ctypes.CDLL(None).sigaction(signal.SIGTERM, None, action)
    _of_jax[:] = [action]


class Interrupt:
    """Turns the first SIGTERM or SIGINT into a request; the second acts as it does without this.

    So does one that comes before the first step is done, which may compile for minutes: there is
    nothing to save yet. With several processes one that gets a signal tells the others, and all
    stop after the same step. It belongs to the main thread.

        with Interrupt() as interrupt:
            for step in ...:
                ...
                if interrupt.stop_requested(step):
                    break
    """

    def __init__(self):
        self._asked = False
        self._handlers: dict[signal.Signals, Any] = {}

    def stop_requested(self, step: int) -> bool:
        """Returns whether to save now and stop.

        All processes must call it after every step: when it is first true, it is so on all of them.

        Args:
          step: optimizer steps done.
        """
        if not self._asked and not self._handlers:
            self._catch()
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _catch(self) -> None:
        if jax.process_count() > 1 and not _of_jax:
            keep_handler_of_jax()
        self._handlers = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _ask(self, number: int, _: Any) -> None:
        if self._asked:
            self._restore()
            signal.raise_signal(number)
            return
        self._asked = True
        if jax.process_count() > 1:
            ctypes.CDLL(None).sigaction(signal.SIGTERM, _of_jax[0], None)
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            # Python has no name for JAX's handler of several processes, and gives None.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
