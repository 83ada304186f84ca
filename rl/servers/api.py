"""What every server is asked and answers, whichever words it has for it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from errors import UserError
from rl.servers.http import Ask


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A completion that is asked for.

    Attributes:
      tokens: ids to go on from.
      max_new_tokens: how many may be sampled.
      stops: ids with which it ends.
      temperature: 0 is greedy.
      seed: a signed number of 64 bits; None leaves it to the server.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stops: tuple[int, ...]
    temperature: float
    seed: int | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion as a server returns it.

    Attributes:
      tokens: int32, the ids sampled, the stop id included.
      logprobs: float32, of each.
      ended: why it ended, in the server's words; "abort" where it was told to.
      version: the label of the weights, where the server says it.
      likeliest: of the first token: ids that were asked for beside it -> log-prob.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: str
    version: str | None = None
    likeliest: dict[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, tokens: Sequence[Any], logprobs: Sequence[Any], ended: str, version: str | None = None
    ) -> "Answer":
        """Returns an answer whose parts fit one another.

        Raises UserError if they do not.
        """
        if len(tokens) != len(logprobs):
            raise UserError(
                f"a completion of {len(tokens):,} tokens has {len(logprobs):,} log-probs: nothing "
                "can be learnt from it"
            )
        try:
            ids, values = np.asarray(tokens, np.int64), np.asarray(logprobs, np.float32)
            fits = ids.ndim == values.ndim == 1 and np.isfinite(values).all() and np.all(ids >= 0)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise UserError("a completion has an id or a log-prob that is no number")
        return cls(ids.astype(np.int32), values, ended, version)


class API(Protocol):
    """How one kind of server is asked.

    Attributes:
      name: of the server.
      logprobs_hint: how it is started so that log-probs are at the sampling temperature.
    """

    name: str
    logprobs_hint: str

    def request(self, model: str, wanted: Wanted, likeliest: int = 0) -> tuple[str, dict[str, Any]]:
        """Returns the path and the body of a request for a completion.

        Args:
          model: the name by which the server knows it.
          likeliest: how many of the likeliest ids at the first token are to be told too.
        """
        ...

    def answer(self, body: Any) -> Answer:
        """Returns what was answered. Raises UserError if something of it is missing."""
        ...

    def reload(self, ask: Ask, directory: str, version: str) -> None:
        """Lets the server load weights and forget what it computed with others.

        Args:
          directory: a Hugging Face checkpoint, as the server sees it.
          version: a label for them.

        Raises:
          UserError: it does not load them.
          Unanswered: see `http`; it may be asked again.
        """
        ...

    def version(self, ask: Ask) -> str | None:
        """Returns the label of the weights that the server has; None where it does not tell."""
        ...

    def abort(self, ask: Ask) -> None:
        """Lets all completions under way end, which are answered with what they have."""
        ...
