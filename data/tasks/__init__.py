"""Tasks whose answers can be checked, by the name a source string calls them."""

from data.tasks.arithmetic import Arithmetic
from data.tasks.problem import Problem, Task

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
}

__all__ = ["TASKS", "Problem", "Task"]
