"""Problems as documents ("task:NAME?PARAMETERS" among `data.sources`) and as problems, for
reinforcement learning and evaluation.
"""

import dataclasses
import difflib
import functools
import itertools
import random
from collections.abc import Iterator
from urllib.parse import parse_qsl

from data.documents import Document, Messages, Split, uniform_hash
from data.tasks import TASKS, Problem, Task
from errors import UserError

# One problem in ten is held out, by the hash of its question, whatever `data.validation` is: a
# stage of training that never saw another stage's config still agrees with it on which problems are
# for evaluation.
VALIDATION_SHARE = 0.1

# Draws in a row without a new problem after which there are taken to be no more.
LAST_DRAWS = 2_000


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """Parameters of every task: how its problems become documents.

    Attributes:
      count: distinct problems in the source, the held-out ones included.
      style: what a document is where no chat is asked for: "text" (Question, Thought, Answer), or
        "chat", the conversation in `data.chat_template`.
      direct: share of documents that state the answer without working it out, as people do.
    """

    count: int = 20_000
    style: str = "text"
    direct: float = 0.0

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"count = {self.count}: must be at least 1")
        if self.style not in ("text", "chat"):
            raise UserError(f'style = {self.style}: must be "text" or "chat"')
        if not 0 <= self.direct <= 1:
            raise UserError(f"direct = {self.direct}: must be between 0 and 1")


class TaskDocuments:
    """Problems 0 .. count - 1 of a task, all different, as text or as conversations."""

    kind = "task"
    validation_share = VALIDATION_SHARE

    def __init__(self, spec: str, chat: bool):
        self.spec = spec
        self._task, self._rendering = parse_task(spec)
        self._body = messages_of if chat or self._rendering.style == "chat" else text_of
        self._problems = distinct_problems(self._task, self._rendering.count)

    def __len__(self) -> int:
        return len(self._problems)

    def key(self, index: int) -> str:
        return self._problems[index].question

    def __getitem__(self, index: int) -> Document:
        problem = self._problems[index]
        if uniform_hash(f"direct/{problem.question}") < self._rendering.direct:
            problem = dataclasses.replace(problem, trace="")
        return Document(f"{self._task.name}:{index}", self._body(problem))


def draw_problems(source: str, split: Split, count: int, seed: int) -> list[Problem]:
    """Distinct problems of one split, in an order that depends on the seed.

    Of the source's parameters those of the task count; `count`, `style` and `direct` speak of
    documents and say nothing here.

    Raises UserError if the source is not a task's, or the task has fewer problems than asked for.
    """
    task, _ = parse_task(source)
    in_split = (
        problem
        for problem in _distinct(task, str(seed))
        if (uniform_hash(problem.question) < VALIDATION_SHARE) == (split == "validation")
    )
    found = list(itertools.islice(in_split, count))
    if len(found) < count:
        raise UserError(
            f'"{source}" has only about {len(found)} different problems for {split}; {count} are asked for'
        )
    return found


@functools.lru_cache(maxsize=8)  # training, validation and the tokenizer open the same source
def distinct_problems(task: Task, count: int) -> tuple[Problem, ...]:
    """The first `count` different problems of a task. Raises UserError if it has fewer."""
    found = tuple(itertools.islice(_distinct(task, "source"), count))
    if len(found) < count:
        raise UserError(
            f"task:{task.name} has only about {len(found)} different problems with these parameters; lower count = {count}"
        )
    return found


def _distinct(task: Task, seed: str) -> Iterator[Problem]:
    """Problems no two of which ask the same, until there are no more."""
    seen = set()
    last = 0
    for index in itertools.count():
        problem = task.problem(random.Random(f"{seed}/{index}"))
        if problem.question not in seen:
            seen.add(problem.question)
            last = index
            yield problem
        elif index - last > LAST_DRAWS:
            return


def parse_task(spec: str) -> tuple[Task, DocumentOptions]:
    """The task a source string names, with its parameters. Raises UserError if it names none, or a
    parameter the task does not have.
    """
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if kind != "task" or name not in TASKS:
        raise UserError(
            f'"{spec}" names no task; write task:NAME?PARAMETERS with NAME one of {", ".join(TASKS)}'
        )
    given = dict(parse_qsl(query, keep_blank_values=True))
    fields = {
        field.name: (owner, field)
        for owner in (TASKS[name], DocumentOptions)
        for field in dataclasses.fields(owner)
    }
    values: dict[type, dict] = {TASKS[name]: {}, DocumentOptions: {}}
    for parameter, text in given.items():
        if parameter not in fields:
            nearest = difflib.get_close_matches(parameter, fields, n=1)
            raise UserError(
                f'"{spec}": no parameter {parameter}; '
                + (f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(fields)}")
            )
        owner, field = fields[parameter]
        try:
            values[owner][parameter] = field.type(text)
        except ValueError as error:
            raise UserError(
                f'"{spec}": {parameter} = {text} is not of type {field.type.__name__}'
            ) from error
    try:
        return TASKS[name](**values[TASKS[name]]), DocumentOptions(**values[DocumentOptions])
    except UserError as error:
        raise UserError(f'"{spec}": {error}') from error


def text_of(problem: Problem) -> str:
    """A problem and its solution, as a text to pretrain on; without a trace it has no thought."""
    thought = f"Thought: {problem.trace}\n" if problem.trace else ""
    return f"Question: {problem.question}\n{thought}Answer: {problem.answer}\n"


def messages_of(problem: Problem) -> Messages:
    """A problem and its solution, as a conversation; without a trace the thought is empty."""
    solution = f"<think>{problem.trace}</think><answer>{problem.answer}</answer>"
    return [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": solution},
    ]
