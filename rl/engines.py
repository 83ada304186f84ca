"""What an engine has, be it of this process (rl/engine.py) or a server's (rl/servers/engine.py)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from rl.request import Counts, Prompt
from rl.trajectory import Trajectory


class AnyEngine(Protocol):
    """Samples completions of prompts that are submitted, with weights that it is given.

    One thread at a time calls it. What the methods do in this process is in `rl.engine.Engine`.

    Attributes:
      counts: what it has done.
      outside: whether another program computes the log-probs, which rounds otherwise and records
        neither experts nor keys.
    """

    counts: Counts
    outside: bool

    def load(self, variables: dict, version: int = 0, *, read_again: bool = False) -> None:
        """Samples with these variables, of this version, from the next token on."""
        ...

    def loaded(
        self, variables: dict, version: int = 0, *, recording: bool = True
    ) -> contextlib.AbstractContextManager[None]:
        """Loads variables for the time being; what there is to do waits until then."""
        ...

    def unload(self) -> None:
        """Lets go of the variables; what there is to do stays."""
        ...

    def submit(self, prompt: Prompt, begun: Mapping[int, Trajectory] | None = None) -> None:
        """Adds a prompt, of which some completions have something already, by their number."""
        ...

    def run(
        self, prompts: Iterable[Prompt] = (), most_tokens: int | None = None
    ) -> Iterator[Trajectory]:
        """Yields the completions of prompts, and of those submitted before, each as it ends."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any completion has not ended, or has not been returned."""
        ...

    def step(self) -> list[Trajectory]:
        """Goes on for a while, and returns the completions that ended."""
        ...

    def take_out(self) -> list[Trajectory]:
        """Returns what the completions that were not returned have, and lets go of them."""
        ...
