"""The interface of a task: it makes problems whose answers can be checked."""

import random
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and one way to get there.

    Attributes:
      question: the question in natural language.
      answer: the one right answer, as it should be written.
      trace: the steps that lead to it, in the notation of the task; empty to leave them out.
      ops: number of steps.
    """

    question: str
    answer: str
    trace: str
    ops: int


class Task(Protocol):
    """A family of problems.

    It is a frozen dataclass whose fields are the parameters of its source string. They are checked
    when it is made, with a UserError that names the field.
    """

    name: ClassVar[str]

    def problem(self, rng: random.Random) -> Problem:
        """Makes one problem, decided by `rng` alone."""
        ...
