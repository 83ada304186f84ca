"""A run that is asked to stop (by a scheduler's SIGTERM or Ctrl-C) finishes its step and saves."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Turns the first SIGTERM or SIGINT into a request; the second acts as it does without this.

    With several processes SIGTERM alone is caught, and by JAX itself: a process that gets it tells
    the others, and all stop after the same step. It must be entered in the main thread.

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
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Interrupt":
        if jax.process_count() == 1:
            self._handlers = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _ask(self, *_) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
