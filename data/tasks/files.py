"""Problems from files: JSON lines or Parquet, one problem a record.

    task:jsonl:FILE#QUESTION,ANSWER          the names of two fields
    task:parquet:FILE#QUESTION,ANSWER        the same of columns
    task:jsonl:FILE#QUESTION                 no answers: rewards of one's own need none

FILE may be a glob. A question is a text, or a conversation that ends with the user; an answer is a
text or a number. All other fields of a record are the problem's `data`. The problems are in memory.
"""

import codecs
import functools
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet

from data.documents import Messages
from data.file_set import readable
from data.json_lines import COMPRESSIONS, decompress
from data.records import (
    decode_utf8,
    is_message,
    missing_field,
    without_nulls,
    without_surrogates,
)
from data.tasks.problem import Problem
from errors import UserError

# Number of a record from 1, as people find it in its file, and its fields.
NumberedRecord = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class ProblemFiles:
    """The tasks "jsonl" and "parquet"; its parameters say where what is.

    Attributes:
      kind: "jsonl" or "parquet".
      files: a file, or a glob of several.
      question, answer: the fields that have them; no `answer` leaves it "".
      validation: the held-out problems, a file with the same fields; "" holds out a tenth.
      answer_after: a mark such as "####": the answer is what stands behind the last one in its
        field, and what stands before is the way to it, which fine-tuning shows.

    Raises:
      UserError: no such file, or a record without the fields; names file and record.
    """

    name: ClassVar[str] = "file"

    kind: str
    files: str
    question: str
    answer: str
    validation: str = ""
    answer_after: str = ""

    def __post_init__(self):
        self._problems()  # reads the files: a fault in them is an error here

    def __len__(self) -> int:
        return len(self._problems()[0])

    def __getitem__(self, index: int) -> Problem:
        return self._problems()[0][index]

    @property
    def held_out(self) -> list[Problem] | None:
        """The problems of the file for validation; None without one."""
        return self._problems()[1]

    def _problems(self) -> tuple[list[Problem], list[Problem] | None]:
        return read_task(self)


@functools.lru_cache(maxsize=4)  # training, validation and the tokenizer open the same task
def read_task(task: ProblemFiles) -> tuple[list[Problem], list[Problem] | None]:
    """Returns the problems for training, and those of `validation` or None.

    A question that is for validation is not trained on, should both files have it.
    """
    problems = _read_problems(task, task.files)
    if not task.validation:
        return problems, None
    validation = _read_problems(task, task.validation)
    questions = {problem.question for problem in validation}
    training = [problem for problem in problems if problem.question not in questions]
    if not training:
        raise UserError(f"{task.files}: all its questions are in {task.validation} too")
    return training, validation


def _read_problems(task: ProblemFiles, pattern: str) -> list[Problem]:
    """Returns the problems of the files that match a pattern; at least one."""
    # A name of brackets is a pattern too, and means the file if there is one.
    exact = Path(pattern)
    paths = [exact] if exact.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not paths:
        raise UserError(f"no file matches {pattern} (looked from {Path.cwd()})")
    problems = []
    for path in paths:
        with readable(path):
            for number, record in FORMATS[task.kind](path):
                problems.append(_problem(task, record, f"{path}:{number}"))
    if not problems:
        raise UserError(f"{pattern}: has no problem")
    return problems


def _problem(task: ProblemFiles, record: Mapping[str, Any], where: str) -> Problem:
    """Makes a problem of a record. Raises UserError, which begins with `where`."""
    for field in filter(None, (task.question, task.answer)):
        if field not in record:
            raise UserError(f"{where}: {missing_field(field, record)}")
    question, messages = _question(record[task.question], where, task.question)
    trace, answer = "", ""
    if task.answer:
        answer = _answer(record[task.answer], where, task.answer)
        if task.answer_after:
            trace, mark, answer = (part.strip() for part in answer.rpartition(task.answer_after))
            if not mark:
                raise UserError(
                    f'{where}: field "{task.answer}" has no {task.answer_after!r} (answer_after)'
                )
        if not answer.strip():
            raise UserError(f'{where}: field "{task.answer}" has an empty answer')
    rest = {name: value for name, value in record.items() if name != task.question}
    return Problem(question, answer, trace, id=where, messages=messages, data=rest)


def _question(value: object, where: str, field: str) -> tuple[str, Messages]:
    """Returns a question as text and as messages."""
    if isinstance(value, str) and value.strip():
        return value, [{"role": "user", "content": value}]
    if isinstance(value, list) and value and all(map(is_message, value)):
        last = value[-1].get("content")
        if value[-1]["role"] == "user" and isinstance(last, str):
            return json.dumps(value) if len(value) > 1 else last, value
    raise UserError(
        f'{where}: field "{field}" is {json.dumps(value, default=str)[:60]}, neither a text nor a '
        "list of messages that ends with the user's"
    )


def _answer(value: object, where: str, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(
        f'{where}: field "{field}" is {json.dumps(value, default=str)[:60]}, neither a text nor a '
        "number"
    )


def _json_lines(path: Path) -> Iterator[NumberedRecord]:
    """Yields the records of a file of JSON lines, which may be compressed."""
    compressed = path.suffix in COMPRESSIONS
    content = b"".join(decompress(path)) if compressed else path.read_bytes()
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            yield number, _json_object(line, f"{path}:{number}")


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record, _ = without_surrogates(json.loads(decode_utf8(line, where)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object")
    return record


def _parquet_rows(path: Path) -> Iterator[NumberedRecord]:
    """Yields the rows of a Parquet file."""
    number = 0
    try:
        opened = pyarrow.parquet.ParquetFile(path)
        names = opened.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f'{path}: has two columns named "{twice}"')
        for batch in opened.iter_batches():
            for row in range(batch.num_rows):
                number += 1
                values = batch.slice(row, 1).to_pylist()[0]
                yield number, {name: without_nulls(value) for name, value in values.items()}
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path}:{number}: cannot be read as Parquet ({words})") from error


FORMATS: dict[str, Callable[[Path], Iterator[NumberedRecord]]] = {
    "jsonl": _json_lines,
    "parquet": _parquet_rows,
}
