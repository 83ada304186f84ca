"""The interface of a task: it has problems whose answers can be checked."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Protocol, runtime_checkable

from data.documents import Messages


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and one way to get there.

    Attributes:
      question: the question in natural language; it alone decides the split.
      answer: the right answer, as it should be written; "" where rewards need none.
      trace: the steps that lead to it, as fine-tuning shows them; empty to leave them out.
      ops: number of steps, where the task counts them.
      id: how errors and samples name the problem; by default made from the question.
      messages: the prompt as a conversation; by default the question as one user's message.
      data: whatever else its reward needs: unit tests, a rubric, the other fields of a file.
    """

    question: str
    answer: str
    trace: str = ""
    ops: int = 0
    id: str = ""
    messages: Messages = dataclasses.field(default_factory=list)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.id:
            digest = blake2b(self.question.encode("utf-8", "replace"), digest_size=6).hexdigest()
            object.__setattr__(self, "id", digest)
        if not self.messages:
            asked = [{"role": "user", "content": self.question}]
            object.__setattr__(self, "messages", asked)


class GeneratedTask(Protocol):
    """A family of problems without an end.

    It is a frozen dataclass whose fields are the parameters of its source string. They are checked
    when it is made, with a UserError that names the field.
    """

    name: ClassVar[str]

    def problem(self, rng: random.Random) -> Problem:
        """Makes one problem, decided by `rng` alone."""
        ...


@runtime_checkable
class ListedTask(Protocol):
    """A list of problems, in an order that never changes.

    One with problems that are for validation has them as `held_out`, a sequence of its own, and all
    others are for training. Without it a tenth is held out, by the hash of the question.
    """

    name: ClassVar[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


Task = GeneratedTask | ListedTask


def held_out(task: ListedTask) -> Sequence[Problem] | None:
    """Returns the problems that a list has for validation; None where their hash decides."""
    return getattr(task, "held_out", None)
