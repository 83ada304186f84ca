"""Source strings of tasks, "task:NAME?PARAMETERS", and the table of the tasks that they name."""

import dataclasses
import difflib
import typing
from typing import Any
from urllib.parse import parse_qsl

from data.tasks.arithmetic import Arithmetic
from data.tasks.problem import Task
from errors import UserError

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
}


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """Parameters that every task takes: how its problems become documents.

    Attributes:
      count: number of distinct problems in the source, those for validation included.
      style: form of a document outside of chat fine-tuning: "text" (Question, Thought, Answer), or
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


def parse_task(spec: str) -> tuple[Task, DocumentOptions]:
    """Parses a source string into its task and its document options.

    Args:
      spec: "task:NAME" or "task:NAME?PARAMETER=VALUE&...", where a parameter is a field of the task
        or of `DocumentOptions`.

    Raises:
      UserError: the string names no task or an unknown parameter, or a value is refused.
    """
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if kind != "task" or name not in TASKS:
        raise UserError(
            f'"{spec}" names no task; write task:NAME?PARAMETERS with NAME one of '
            f"{', '.join(TASKS)}"
        )
    task_types, option_types = _parameter_types(TASKS[name]), _parameter_types(DocumentOptions)
    types = task_types | option_types
    values = {
        parameter: _parse_value(spec, parameter, text, types)
        for parameter, text in dict(parse_qsl(query, keep_blank_values=True)).items()
    }
    try:
        task = TASKS[name](**{key: values[key] for key in values if key in task_types})
        options = DocumentOptions(**{key: values[key] for key in values if key in option_types})
    except UserError as error:
        raise UserError(f'"{spec}": {error}') from error
    return task, options


def _parameter_types(parameters: Any) -> dict[str, type]:
    """Returns the type of each field of a dataclass, in the order of the fields."""
    types = typing.get_type_hints(parameters)
    return {field.name: types[field.name] for field in dataclasses.fields(parameters)}


def _parse_value(spec: str, parameter: str, text: str, types: dict[str, type]) -> Any:
    """Returns the value of one parameter. Raises UserError if it is unknown or of another type."""
    if parameter not in types:
        nearest = difflib.get_close_matches(parameter, types, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(types)}"
        raise UserError(f'"{spec}": no parameter {parameter}; {hint}')
    try:
        return types[parameter](text)
    except ValueError as error:
        raise UserError(
            f'"{spec}": {parameter} = {text} is not of type {types[parameter].__name__}'
        ) from error
