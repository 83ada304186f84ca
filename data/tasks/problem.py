"""What a task is: problems whose answers can be checked."""

import random
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Problem:
    """A question, the answer it has, and one way to get there.

    Attributes:
      question: what is asked, in natural language.
      answer: the one right answer, as it should be written.
      trace: the steps that lead to it, in the notation of the task; empty where they are left out.
      ops: number of steps.
    """

    question: str
    answer: str
    trace: str
    ops: int


class Task(Protocol):
    """A family of problems. A frozen dataclass whose fields are the parameters of a "task:NAME?..."
    string, validated when it is made.
    """

    name: ClassVar[str]

    def problem(self, rng: random.Random) -> Problem:
        """One problem, decided by `rng` alone."""
        ...
