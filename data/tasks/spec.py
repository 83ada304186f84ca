"""Source strings of tasks, "task:NAME?PARAMETERS", and the table of the tasks that they name."""

import dataclasses
import typing
from typing import Any

from data.options import option_value, split_options, unknown
from data.python_files import errors_in
from data.tasks.arithmetic import Arithmetic
from data.tasks.files import FORMATS, ProblemFiles
from data.tasks.own import own_task, task_classes
from data.tasks.problem import Task
from errors import UserError

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
}

# Tasks of a person's own: name -> (file, class).
OWN_TASKS: dict[str, tuple[str, type]] = {}

MOST_DOCUMENTS = 1_000_000  # of one source: they are in memory


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """Parameters that every task takes: how its problems become documents.

    Attributes:
      count: number of distinct problems in the source, those for validation included; 0 for all of
        a list of problems, and for at most 20,000 of a task that generates them.
      style: form of a document outside of chat fine-tuning: "text" (Question, Thought, Answer), or
        "chat", the conversation in `data.chat_template`.
      direct: share of documents that state the answer without working it out, as people do.
    """

    count: int = 0
    style: str = "text"
    direct: float = 0.0

    def __post_init__(self):
        if not 0 <= self.count <= MOST_DOCUMENTS:
            raise UserError(f"count = {self.count}: must be 0 (all) to {MOST_DOCUMENTS:,}")
        if self.style not in ("text", "chat"):
            raise UserError(f'style = {self.style}: must be "text" or "chat"')
        if not 0 <= self.direct <= 1:
            raise UserError(f"direct = {self.direct}: must be between 0 and 1")


def register_tasks(path: str) -> None:
    """Makes the tasks of a person's Python file known by their names.

    Raises:
      UserError: the file fails, has no task, or one named as a task that there is.
    """
    for name, cls in task_classes(path).items():
        _, known = OWN_TASKS.get(name, (path, cls))
        if name in TASKS or name in FORMATS or known is not cls:
            raise UserError(f"{path}: there is a task {name!r} already; give yours another name")
        OWN_TASKS[name] = path, cls


def parse_task(spec: str) -> tuple[Task, DocumentOptions]:
    """Parses a source string into its task and its document options.

    Args:
      spec: "task:NAME" or "task:NAME?PARAMETER=VALUE&...", where a parameter is a field of the task
        or of `DocumentOptions`; or a task of data/tasks/files.py,
        "task:jsonl:FILE#QUESTION,ANSWER?...". In a value, %26 is an ampersand and %25 a per cent.

    Raises:
      UserError: the string names no task or an unknown parameter, or a value is refused.
    """
    kind, _, rest = spec.partition(":")
    if kind == "task" and rest.partition(":")[0] in FORMATS and ":" in rest:
        return _parse_files(spec, rest)
    name, _, query = rest.partition("?")
    if kind != "task" or name not in TASKS | OWN_TASKS:
        raise UserError(
            f'"{spec}" names no task; write task:NAME?PARAMETERS with NAME one of '
            f"{', '.join(TASKS | OWN_TASKS)}, or task:jsonl:FILE#QUESTION,ANSWER; a class of your "
            "own needs --config.tasks=FILE.py"
        )
    if name in TASKS:
        return _build(spec, query, TASKS[name], {})
    path, cls = OWN_TASKS[name]
    with errors_in(path, f' (of "{spec}")'):
        task, options = _build(spec, query, cls, {})
    return own_task(path, spec, task), options


def _parse_files(spec: str, rest: str) -> tuple[Task, DocumentOptions]:
    """Parses what stands behind "task:" of a task from files."""
    kind, _, place = rest.partition(":")
    files, _, tail = place.partition("#")
    names, _, query = tail.partition("?")
    question, _, answer = names.partition(",")
    if not (files and question) or "," in answer:
        raise UserError(
            f'"{spec}" does not say where problems are; write task:{kind}:FILE#QUESTION,ANSWER '
            "with the names of the two fields"
        )
    given = {"kind": kind, "files": files, "question": question, "answer": answer}
    return _build(spec, query, ProblemFiles, given)


def _build(
    spec: str, query: str, cls: type[Any], given: dict[str, str]
) -> tuple[Any, DocumentOptions]:
    """Returns a task of a class and the document options, by the parameters of a query.

    Args:
      given: fields of the class that are no parameters.
    """
    task_types = _parameter_types(cls) if dataclasses.is_dataclass(cls) else {}
    task_types = {name: kind for name, kind in task_types.items() if name not in given}
    option_types = _parameter_types(DocumentOptions)
    types = task_types | option_types
    try:
        values = {name: _value(name, text, types) for name, text in split_options(query).items()}
        task = cls(**given, **{key: values[key] for key in values if key in task_types})
        options = DocumentOptions(**{key: values[key] for key in values if key in option_types})
    except UserError as error:
        raise UserError(f'"{spec}": {error}') from error
    return task, options


def _parameter_types(parameters: Any) -> dict[str, type]:
    """Returns the type of each field of a dataclass, in the order of the fields."""
    types = typing.get_type_hints(parameters)
    return {field.name: types[field.name] for field in dataclasses.fields(parameters)}


def _value(parameter: str, text: str, types: dict[str, type]) -> Any:
    """Returns the value of one parameter. Raises UserError if it is unknown or of another type."""
    if parameter not in types:
        raise UserError(unknown(parameter, types, "parameter"))
    kind = types[parameter]
    if kind not in (int, float, str, bool):
        raise UserError(f"{parameter} is a {kind}; a parameter is an int, float, str or bool")
    return option_value(parameter, text, kind)
