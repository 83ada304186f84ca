"""A server, the weights that it has been given, and what is done when it does not answer."""

import time
import weakref
from pathlib import Path
from typing import Any

import jax

from errors import UserError
from rl.servers.api import API
from rl.servers.export import Exports
from rl.servers.http import Address, Request, Unanswered

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before what failed is asked again


def pause(failures: int) -> float:
    """Returns how long to wait after so many failures in a row, in seconds."""
    return min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)


class Server:
    """A server that samples, and the policy that it samples with.

    Several engines may share one. It holds no variables: what they are known by again lets them go.

    Args:
      api: how it is asked.
      address: where it is.
      retries: how often what fails is asked again.
      exports: where weights are handed over.

    Attributes:
      model: the name by which it knows its model, once `rl.servers.checks` has asked.
      doubted: whether it may have died since it was given weights, and be back without them.
    """

    def __init__(self, api: API, address: Address, retries: int, exports: Exports):
        self.api, self.address, self.retries, self._exports = api, address, retries, exports
        self.model = ""
        self.doubted = False
        self._newest: Path | None = None
        self._known_by: list[weakref.ref] = []

    @property
    def url(self) -> str:
        """Where it is, as a person wrote it."""
        return self.address.url

    @property
    def version(self) -> str:
        """The label of the weights that it was given last; "" before the first."""
        return self._newest.name if self._newest else ""

    def ask_once(self, method: str, path: str, body: Any = None) -> Any:
        """Returns the answer to a request. Raises as `rl.servers.http.Request.answer` does."""
        return Request(self.address, method, path, body).answer()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Returns the answer to a request that is made again while there is none.

        Raises UserError: it is refused, or stays unanswered.
        """
        failures = 0
        while True:
            try:
                return self.ask_once(method, path, body)
            except Unanswered as error:
                self.doubted |= error.gone
                failures += 1
                self.wait(error, failures)

    def wait(self, error: Exception, failures: int) -> None:
        """Waits before what failed is asked again, and says so.

        Args:
          failures: how often it has failed, in a row.

        Raises UserError if that is more often than it is to be asked again.
        """
        if failures > self.retries:
            raise UserError(
                f"{self.url}: {error}, {failures} times in a row (sampling.server_retries); start "
                "the server again, and the run by the same command: it goes on from its last "
                "checkpoint"
            ) from error
        seconds = pause(failures)
        print(f"{'server':<12}{error}; asks again in {seconds:g} s", flush=True)
        time.sleep(seconds)

    def hand_over(self, variables: dict) -> None:
        """Lets the server sample with these variables, unless it does already.

        No completion may be under way.

        Raises UserError: the server does not load them, or stays away.
        """
        if not self._has(variables):
            newest = self._exports.write(variables)
            self._known_by = [weakref.ref(leaf) for leaf in jax.tree.leaves(variables)]
            self._newest = newest
            self._reload()
            self._exports.keep_only(newest)
        elif self.doubted or self.api.version(self.ask) != self.version:
            self._reload()

    def restore(self, error: Exception, failures: int) -> None:
        """Waits for a server that failed, and gives it its weights again, which it may have lost.

        Raises as `wait` does.
        """
        self.wait(error, failures)
        if self._newest is not None:
            self._reload()

    def _has(self, variables: dict) -> bool:
        """Returns whether the weights that were handed over last are of these variables."""
        leaves = jax.tree.leaves(variables)
        return len(leaves) == len(self._known_by) and all(
            known() is leaf for known, leaf in zip(self._known_by, leaves, strict=True)
        )

    def _reload(self) -> None:
        """Reloads what was handed over last; all of it again where the server goes in between."""
        failures = 0
        while True:
            try:
                self.api.reload(self.ask_once, str(self._newest), self.version)
                break
            except Unanswered as error:
                failures += 1
                self.wait(error, failures)
            except UserError as error:
                self._known_by = []
                raise self.named(error) from error
        self.doubted = False

    def named(self, error: UserError) -> UserError:
        """Returns an error that begins with the server's URL."""
        return error if str(error).startswith(self.url) else UserError(f"{self.url}: {error}")
