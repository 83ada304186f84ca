"""Asked to stop (SIGTERM of a scheduler, Ctrl-C), a run finishes its step, saves and ends well."""

import signal

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Within it, the first SIGTERM or SIGINT only asks; the second does what it always did.

    With several processes the schedulers' SIGTERM alone is caught, and by JAX itself: a process
    that gets it tells the others, and all stop after the same step. Needs the main thread.

        with Interrupt() as interrupt:
            for step in ...:
                ...
                if interrupt.stop_requested(step):
                    break
    """

    def __init__(self):
        self._asked = False
        self._handlers: dict[int, signal.Handlers] = {}

    def stop_requested(self, step: int) -> bool:
        """Whether to save now and stop. To be called after every step, by all processes alike: the
        first time it is True, it is so on all of them.

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
