"""Tasks of a person's own: the classes of a Python file, each registered under its name.

    from dataclasses import dataclass
    from data.tasks.problem import Problem

    @dataclass(frozen=True)
    class Reverse:
        name = "reverse"        # "task:reverse?longest=6"
        longest: int = 8        # a parameter of the source string

        def problem(self, rng):
            word = "".join(rng.choices("abc", k=rng.randint(2, self.longest)))
            return Problem(f"Write {word} backwards.", word[::-1])

A class has `problem`, or `__len__` and `__getitem__` (data/tasks/problem.py).
"""

import contextlib
import dataclasses
import random
from collections.abc import Sequence
from typing import Any, ClassVar

from data.python_files import errors_in, load_python_file
from data.tasks.problem import ListedTask, Problem, Task, held_out
from errors import UserError


def task_classes(path: str) -> dict[str, type]:
    """Runs a Python file, once, and returns the tasks that it defines, by name.

    Raises:
      UserError: the file fails, it has no task, or two of one name.
    """
    module = load_python_file(path)
    found: dict[str, type] = {}
    for value in vars(module).values():
        if not isinstance(value, type) or value.__module__ != module.__name__:
            continue
        if not (hasattr(value, "problem") or hasattr(value, "__getitem__")):
            continue
        name = getattr(value, "name", None)
        if not (isinstance(name, str) and name.isidentifier()):
            raise UserError(
                f"{path}: class {value.__name__} has problems and no name; give it "
                f"name = {value.__name__.lower()!r}"
            )
        if name in found:
            raise UserError(f"{path}: two tasks are named {name!r}")
        found[name] = value
    if not found:
        raise UserError(
            f"{path}: defines no task: a class with a name, and problem(rng) or __getitem__(index)"
        )
    return found


@dataclasses.dataclass(frozen=True)
class OwnGenerated:
    """A task that generates, of a person's class, whose errors are one line."""

    name: ClassVar[str] = "own"

    path: str
    spec: str
    task: Any = dataclasses.field(compare=False)

    def problem(self, rng: random.Random) -> Problem:
        """Makes one problem. Raises UserError where the person's code fails."""
        with own_errors(self.path, self.spec):
            return checked_problem(self.task.problem(rng), self.path, self.spec)


@dataclasses.dataclass(frozen=True)
class OwnListed:
    """A list of problems of a person's class, whose errors are one line."""

    name: ClassVar[str] = "own"

    path: str
    spec: str
    task: Any = dataclasses.field(compare=False)

    def __len__(self) -> int:
        with own_errors(self.path, self.spec):
            return len(self.task)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with own_errors(self.path, self.spec):
            return checked_problem(self.task[index], self.path, self.spec)

    @property
    def held_out(self) -> Sequence[Problem] | None:
        """The problems that the class holds out; None where it leaves that to the hash."""
        with own_errors(self.path, self.spec):
            others = held_out(self.task)
            if others is None:
                return None
            return [checked_problem(problem, self.path, self.spec) for problem in others]


def own_errors(path: str, spec: str) -> contextlib.AbstractContextManager:
    """Turns what a person's class raises into one line with the file and the task."""
    return errors_in(path, f' (of "{spec}")')


def checked_problem(found: object, path: str, spec: str) -> Problem:
    """Returns what a class made, if it is a problem with a question. Raises UserError."""
    if not isinstance(found, Problem):
        raise UserError(
            f'{path}: "{spec}" gave a {type(found).__name__}, not a data.tasks.problem.Problem'
        )
    if not (isinstance(found.question, str) and isinstance(found.answer, str) and found.question):
        raise UserError(
            f'{path}: "{spec}" gave a problem whose question or answer is no text: '
            f"{found.question!r:.60}, {found.answer!r:.60}"
        )
    return found


def own_task(path: str, spec: str, task: Any) -> Task:
    """Returns a person's task with its errors turned into lines."""
    return (OwnListed if isinstance(task, ListedTask) else OwnGenerated)(path, spec, task)
