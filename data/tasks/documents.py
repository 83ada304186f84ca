"""Problems of a task as documents: texts to pretrain on, or conversations to fine-tune on."""

import dataclasses
from collections.abc import Sequence

from data.documents import Document, Messages, Split, uniform_hash
from data.tasks.draw import VALIDATION_SHARE, distinct_problems
from data.tasks.problem import Problem
from data.tasks.spec import parse_task


class TaskDocuments:
    """A source (`data.documents.Source`) of the problems of a task, one document each."""

    kind = "task"
    validation_share: float | None = VALIDATION_SHARE

    def __init__(self, spec: str, chat: bool):
        """Opens the source "task:NAME?PARAMETERS".

        Args:
          spec: names the task, its parameters and those of `DocumentOptions`.
          chat: gives conversations whatever the "style" of the spec is.

        Raises:
          UserError: the string is wrong, or the task has fewer problems than its "count".
        """
        self.spec = spec
        self._task, self._options = parse_task(spec)
        self._body = as_messages if chat or self._options.style == "chat" else as_text
        self._problems, self._splits = distinct_problems(self._task, self._options.count)

    def __len__(self) -> int:
        return len(self._problems)

    def key(self, index: int) -> str:
        """Returns the question, whose hash decides the split unless the task does."""
        return self._problems[index].question

    def in_split(self, split: Split) -> Sequence[int]:
        """Returns the indices of the problems of a split."""
        return [index for index, its in enumerate(self._splits) if its == split]

    def __getitem__(self, index: int) -> Document:
        problem = self._problems[index]
        if uniform_hash(f"direct/{problem.question}") < self._options.direct:
            problem = dataclasses.replace(problem, trace="")
        return Document(f"{self._task.name}:{index}", self._body(problem))


def as_text(problem: Problem) -> str:
    """Writes a problem and its solution as a text; without a trace the text has no thought."""
    thought = f"Thought: {problem.trace}\n" if problem.trace else ""
    return f"Question: {problem.question}\n{thought}Answer: {problem.answer}\n"


def as_messages(problem: Problem) -> Messages:
    """Writes a problem and its solution as a conversation; without a trace the thought is empty."""
    solution = f"<think>{problem.trace}</think><answer>{problem.answer}</answer>"
    return [*problem.messages, {"role": "assistant", "content": solution}]
