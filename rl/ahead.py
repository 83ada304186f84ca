"""Steps whose groups are sampled before the policy that learns from them is there.

With a lag of k, the groups of a step are sampled by the policy of k steps earlier, or by the first
one at the beginning: weights take so long to arrive (PipelineRL, arXiv 2509.19128; ScaleRL, arXiv
2510.13786, section 3, has k = 8). Which policy samples what depends on no clock, so such a run is
repeated, and resumed, to the bit.

Where the sampler has devices of its own, or is a server, it works in a thread of its own, while the
trainer learns from what was sampled before. Nothing else changes: a step has the groups that it
would have had.
"""

import collections
import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from checkpoints.cursors import Place
from rl.clock import Parts
from rl.sampler import Sampled, Sampler
from rl.weights import Weights


class Done(NamedTuple):
    """What has been sampled for a step, and where the sampler was then."""

    sampled: Sampled
    place: Place


class Ahead:
    """Has steps sampled `lag` steps ahead. It is the cursor of a run.

    Use it as a context: at its end nothing is being sampled.

    Args:
      weights: brings the policy to the devices of the sampler, or keeps a copy for a server; None
        where sampling and learning take turns on the same devices.
      parts: what "wait_prev_gen" is measured by, the wait for devices that sample beside.
    """

    def __init__(
        self,
        sampler: Sampler,
        lag: int,
        weights: Weights | None = None,
        parts: Parts | None = None,
    ):
        self._parts = parts or Parts()
        self._sampler, self._lag, self._weights = sampler, lag, weights
        self._executor: Executor = ThreadPoolExecutor(1, "sampler") if weights else Inline()
        self._waiting: collections.deque[Future[Done]] = collections.deque()
        self._before = sampler.place()  # where the sampler was when the first of them began
        self._failure: BaseException | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._sampler.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int, variables: dict) -> Sampled:
        """Returns what a step learns from, and has that of a later one sampled.

        Args:
          step: its number, from 1 on.
          variables: of the policy after the steps before it; they may be donated afterwards.

        Raises what the sampler raised.
        """
        with self._parts("wait_prev_gen") if self._weights else contextlib.nullcontext():
            self._bound_copies()
            arrived = self._weights.sent(variables, step) if self._weights else lambda: variables
            while len(self._waiting) <= self._lag:
                job = functools.partial(self._take, step, arrived)
                self._waiting.append(self._executor.submit(job))
            sampled, self._before = self._waiting[0].result()
        self._waiting.popleft()
        return sampled

    def _bound_copies(self) -> None:
        """Waits until one job at most is not done, so that at most two have weights of theirs."""
        for job in list(self._waiting)[:-1] if self._weights else ():
            job.exception()

    def _take(self, step: int, arrived: Callable[[], dict]) -> Done:
        if self._failure:
            raise self._failure
        try:
            with self._device():
                return Done(self._sampler.take(step, arrived()), self._sampler.place())
        except BaseException as failure:
            self._failure = failure  # what it was asked for next cannot be sampled either
            raise

    def validation(self, step: int, variables: dict) -> dict[str, float]:
        """Returns the figures of held-out problems, once all that waits has been sampled."""
        arrived = self._weights.sent(variables, step) if self._weights else lambda: variables

        def measured() -> dict[str, float]:
            with self._device():
                return self._sampler.validation(arrived())

        return self._executor.submit(measured).result()

    def _device(self) -> contextlib.AbstractContextManager:
        """Keeps what is computed on no mesh from waiting for the trainer's devices."""
        return (
            jax.default_device(self._weights.device) if self._weights else contextlib.nullcontext()
        )

    def settle(self) -> None:
        """Waits until nothing is being sampled, and see `Rollouts.settle`. Raises as `take`."""
        for job in self._waiting:
            job.result()
        self._sampler.settle()

    def place(self) -> Place:
        """Returns where it is now, with what waits to be learnt from.

        If the sampler fails before what waits is done, that is sampled anew from there.
        """
        if not self._lag:
            return self._sampler.place()
        return Place(functools.partial(self._state, self._before, list(self._waiting)))

    def _state(self, place: Place, waiting: list[Future[Done]]) -> dict[str, Any]:
        sampled = []
        for job in waiting:
            if job.exception():
                break
            sampled.append(job.result().sampled)
            place = job.result().place
        packed = [self._sampler.packed(each) for each in sampled]
        return {"rollouts": place.get_state(), "waiting": packed}

    def get_state(self) -> dict[str, Any]:
        """Returns where it is as JSON. Raises as `take`."""
        waiting = [job.result().sampled for job in self._waiting]
        state = self._sampler.place().get_state()
        packed = [self._sampler.packed(each) for each in waiting]
        return {"rollouts": state, "waiting": packed} if self._lag else state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises UserError as `Rollouts.set_state` does."""
        self._waiting.clear()
        self._sampler.set_state(state["rollouts"] if self._lag else state)
        self._before = self._sampler.place()
        for packed in state["waiting"] if self._lag else ():
            done = Done(self._sampler.unpacked(packed), self._before)
            self._waiting.append(Inline().submit(lambda done=done: done))

    def metrics(self, step: int, sampled: Sampled) -> dict[str, float]:
        """Returns by how many steps the policies of a step's tokens are older than its own.

        "sampling/staleness/mean", "sampling/staleness/max", and the share of tokens of each age,
        "sampling/staleness/share_N".
        """
        trajectories = [completion.trajectory for completion in sampled.completions]
        ages_N = np.concatenate(
            [step - 1 - each.versions_T[each.sampled_T] for each in trajectories]
        )
        found = {
            "sampling/staleness/mean": float(np.mean(ages_N)),
            "sampling/staleness/max": float(np.max(ages_N)),
        }
        for age in range(self._lag + 1) if self._lag else ():
            found[f"sampling/staleness/share_{age}"] = float(np.mean(ages_N == age))
        return found


class Inline(Executor):
    """Does what it is asked for at once, in the thread that asks."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Returns the future of what has been done."""
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as failure:
            future.set_exception(failure)
        return future
