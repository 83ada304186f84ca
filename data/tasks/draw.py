"""Distinct problems of a task: drawn one after the other from a seed, or those of a list."""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence

from data.documents import Split, uniform_hash
from data.tasks.problem import GeneratedTask, ListedTask, Problem, Task, held_out
from data.tasks.spec import parse_task
from errors import UserError

# One problem in ten is for validation, by the hash of its question, whatever `data.validation` is:
# a phase of training that never sees another phase's config still agrees with it on which problems
# are for evaluation.
VALIDATION_SHARE = 0.1

# Draws in a row without a new problem after which a task is taken to have no more of them.
MAX_REPEATED_DRAWS = 2_000

# Problems of a task that generates them, where a source does not say how many.
GENERATED_DOCUMENTS = 20_000


def draw_problems(source: str, split: Split, count: int, seed: int) -> Sequence[Problem]:
    """Returns distinct problems of one split: `count`, or all that there are if they are fewer.

    Args:
      source: a task's string. Only the task's own parameters matter; `count`, `style` and
        `direct` describe documents and change nothing here.
      split: the split to draw from; no problem is in both.
      count: number of problems at most.
      seed: the same seed gives the same problems in the same order, and a greater `count` only
        appends to them.

    Raises:
      UserError: the source is not a task's, or the task has no problem in this split.
    """
    task, _ = parse_task(source)
    if isinstance(task, ListedTask):
        listed = listed_problems(task, split)
        order = list(range(len(listed)))
        random.Random(f"{seed}/order").shuffle(order)
        problems = [listed[index] for index in order[:count]]
    else:
        drawn = _distinct(task, str(seed))
        in_split = (problem for problem in drawn if split_of(problem) == split)
        problems = list(itertools.islice(in_split, count))
    if not problems:
        raise UserError(f'"{source}" has no problem for {split}')
    return problems


def training_problems(source: str, most_generated: int, seed: int) -> Sequence[Problem]:
    """Returns the problems of a task to train on, in an order of their own.

    They are all of a list, and of a task that generates them `most_generated` or as many as it has.

    Raises:
      UserError: as `draw_problems` does.
    """
    task, _ = parse_task(source)
    count = len(task) if isinstance(task, ListedTask) else most_generated
    return draw_problems(source, "train", count, seed)


def split_of(problem: Problem) -> Split:
    """Returns the split of a problem, which its question alone decides."""
    return "validation" if uniform_hash(problem.question) < VALIDATION_SHARE else "train"


def listed_problems(task: ListedTask, split: Split) -> list[Problem]:
    """Returns the problems of a list that are in a split."""
    others = held_out(task)
    problems = [task[index] for index in range(len(task))]
    if others is None:
        return [problem for problem in problems if split_of(problem) == split]
    return problems if split == "train" else list(others)


@functools.lru_cache(maxsize=8)  # training, validation and the tokenizer open the same source
def distinct_problems(task: Task, count: int) -> tuple[tuple[Problem, ...], tuple[Split, ...]]:
    """Returns the first `count` distinct problems of a task, of both splits, and the split of each.

    Those that a list holds out come last, whatever `count` is.

    Args:
      count: 0 for all of a list, and for at most 20,000 of a task that generates them.

    Raises:
      UserError: the task has fewer.
    """
    others: Sequence[Problem] = ()
    if isinstance(task, ListedTask):
        problems = [task[index] for index in range(len(task))][: count or None]
        others = held_out(task) or ()
    else:
        drawn = _distinct(task, "source")
        problems = list(itertools.islice(drawn, count or GENERATED_DOCUMENTS))
    if len(problems) < count:
        raise UserError(
            f"task:{task.name} has only about {len(problems)} different problems with these "
            f"parameters; lower count = {count}"
        )
    by_hash = not (isinstance(task, ListedTask) and held_out(task) is not None)
    if by_hash:
        return tuple(problems), tuple([split_of(problem) for problem in problems])
    splits: list[Split] = ["train" for _ in problems]
    splits.extend("validation" for _ in others)
    return (*problems, *others), tuple(splits)


def _distinct(task: GeneratedTask, seed: str) -> Iterator[Problem]:
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
