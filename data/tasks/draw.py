"""Distinct problems of a task, drawn one after the other from a seed."""

import functools
import itertools
import random
from collections.abc import Iterator

from data.documents import Split, uniform_hash
from data.tasks.problem import Problem, Task
from data.tasks.spec import parse_task
from errors import UserError

# One problem in ten is for validation, by the hash of its question, whatever `data.validation` is:
# a phase of training that never sees another phase's config still agrees with it on which problems
# are for evaluation.
VALIDATION_SHARE = 0.1

# Draws in a row without a new problem after which a task is taken to have no more of them.
MAX_REPEATED_DRAWS = 2_000


def draw_problems(source: str, split: Split, count: int, seed: int) -> list[Problem]:
    """Draws distinct problems of one split, in an order that depends on the seed.

    Args:
      source: "task:NAME?PARAMETERS". Only the task's own parameters matter; `count`, `style` and
        `direct` describe documents and change nothing here.
      split: the split to draw from; no problem is in both.
      count: number of problems.
      seed: the same seed gives the same problems, and a greater `count` only appends to them.

    Raises:
      UserError: the source is not a task's, or the task has fewer than `count` problems.
    """
    task, _ = parse_task(source)
    in_split = (
        problem
        for problem in _distinct(task, str(seed))
        if (uniform_hash(problem.question) < VALIDATION_SHARE) == (split == "validation")
    )
    problems = list(itertools.islice(in_split, count))
    if len(problems) < count:
        raise UserError(
            f'"{source}" has only about {len(problems)} different problems for {split}; '
            f"{count} are asked for"
        )
    return problems


@functools.lru_cache(maxsize=8)  # training, validation and the tokenizer open the same source
def distinct_problems(task: Task, count: int) -> tuple[Problem, ...]:
    """Returns the first `count` distinct problems of a task, of both splits.

    Raises:
      UserError: the task has fewer.
    """
    problems = tuple(itertools.islice(_distinct(task, "source"), count))
    if len(problems) < count:
        raise UserError(
            f"task:{task.name} has only about {len(problems)} different problems with these "
            f"parameters; lower count = {count}"
        )
    return problems


def _distinct(task: Task, seed: str) -> Iterator[Problem]:
    """Yields problems with different questions until the task seems to have no more of them."""
    seen = set()
    last_new = 0
    for index in itertools.count():
        problem = task.problem(random.Random(f"{seed}/{index}"))
        if problem.question not in seen:
            seen.add(problem.question)
            last_new = index
            yield problem
        elif index - last_new > MAX_REPEATED_DRAWS:
            return
