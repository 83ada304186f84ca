"""Formats of many records a file: JSON lines, Parquet, ArrayRecord.

A record is held out by the hash of its file's name and its index in the file: nothing is read to
decide it, and appending to a file moves no record. Where its field holds a conversation, a field
"tools" beside it holds what the assistant may call.
"""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import grain
import numpy as np
import pyarrow
import pyarrow.parquet

from data.documents import Document, Messages, Tools
from data.files import FileSet, locate
from errors import UserError


class Records:
    """What the formats share: a table of (file, record) by index. Subclasses set `kind`, and read
    one record.
    """

    kind: str
    validation_share = None

    def __init__(self, spec: str, files: FileSet, field: str):
        self.spec = spec
        self._files = files
        self._field = field
        self._ends = np.cumsum(
            [self._open(files.path(name)) for name in files.names]
        )  # how many records come before the end of each file

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        file, record = locate(self._ends, index)
        return f"{self._files.names[file]}:{record}"

    def __getitem__(self, index: int) -> Document:
        file, record = locate(self._ends, index)
        place = f"{self._files.names[file]}:{self._number(file, record)}"
        where = str(self._files.root / place)
        body, tools = self._read(file, record, where)
        body = checked_body(body, where, self._field)
        return Document(
            place, body, tools=None if isinstance(body, str) else checked_tools(tools, where)
        )

    def _open(self, path: Path) -> int:
        """Prepares a file, in the order of the names; returns how many records it has."""
        raise NotImplementedError

    def _read(self, file: int, record: int, where: str) -> tuple[object, object]:
        """The body of one record and its tools, None if it has none; neither is checked yet. Errors
        begin with `where`.
        """
        raise NotImplementedError

    def _number(self, file: int, record: int) -> int:
        """What people call the record, counted from 1."""
        return record + 1


class JsonLines(Records):
    """One JSON object a line. Of a plain file only the offsets of its lines are kept; a .gz file is
    unpacked into memory, for it has no random access.
    """

    kind = "jsonl"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._contents: list[Callable[[], BinaryIO]] = []
        self._lines: list[
            np.ndarray
        ] = []  # of each file: number and offset of every line that is not blank, [2, lines]
        super().__init__(spec, files, field)

    def _open(self, path: Path) -> int:
        content: Callable[[], BinaryIO] = functools.partial(path.open, "rb")
        if path.suffix == ".gz":
            try:
                content = functools.partial(io.BytesIO, gzip.decompress(path.read_bytes()))
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: not a whole gzip file ({error})") from error
        lines, offset = [], 0
        with content() as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    lines.append((number, offset))
                offset += len(line)
        self._contents.append(content)
        self._lines.append(np.array(lines, np.int64).reshape(-1, 2).T)
        return len(lines)

    def _read(self, file: int, record: int, where: str) -> tuple[object, object]:
        with self._contents[file]() as opened:
            opened.seek(int(self._lines[file][1, record]))
            return fields_of(opened.readline(), where, self._field)

    def _number(self, file: int, record: int) -> int:
        return int(self._lines[file][0, record])


class ParquetColumn(Records):
    """One column of Parquet files, and for conversations their "tools", held in memory as Arrow
    keeps it.
    """

    kind = "parquet"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._tables: list[pyarrow.Table] = []
        super().__init__(spec, files, field)

    def _open(self, path: Path) -> int:
        try:
            schema = pyarrow.parquet.read_schema(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        if self._field not in schema.names:
            raise UserError(f"{path}: {no_field(self._field, schema.names)}")
        conversations = pyarrow.types.is_nested(schema.field(self._field).type)
        columns = (
            {self._field, "tools"} if conversations and "tools" in schema.names else {self._field}
        )
        self._tables.append(pyarrow.parquet.read_table(path, columns=list(columns)))
        return len(self._tables[-1])

    def _read(self, file: int, record: int, where: str) -> tuple[object, object]:
        table = self._tables[file]
        body, tools = (
            present(table[name][record].as_py()) if name in table.column_names else None
            for name in (self._field, "tools")
        )
        return body, tools


class ArrayRecords(Records):
    """ArrayRecord files by grain's own reader. A record is UTF-8 text, or a JSON object if there is
    a field to read.
    """

    kind = "arrayrecord"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._readers: list[grain.sources.ArrayRecordDataSource] = []
        super().__init__(spec, files, field)

    def _open(self, path: Path) -> int:
        try:
            self._readers.append(grain.sources.ArrayRecordDataSource([str(path)]))
            return len(self._readers[-1])
        except Exception as error:  # the reader raises what its C++ side throws
            raise UserError(f"{path}: not an ArrayRecord file ({error})") from error

    def _read(self, file: int, record: int, where: str) -> tuple[object, object]:
        content = self._readers[file][record]
        return (
            fields_of(content, where, self._field) if self._field else (utf8(content, where), None)
        )


RECORDS: dict[str, type[Records]] = {
    format.kind: format for format in (JsonLines, ParquetColumn, ArrayRecords)
}


def fields_of(line: bytes, where: str, field: str) -> tuple[object, object]:
    """`field` of a JSON object, and its "tools" if it has any. Raises UserError that begins with
    `where` if it is not one, or lacks the field.
    """
    try:
        record = json.loads(utf8(line, where))
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON {type(record).__name__}, not an object with a field {json.dumps(field)}"
        )
    if field not in record:
        raise UserError(f"{where}: {no_field(field, record)}")
    return record[field], record.get("tools")


def present(value: object) -> object:
    """A value of Arrow without the fields that are null: its structs all have the fields that any
    of them has, so that null says no more than absent.
    """
    if isinstance(value, dict):
        return {name: present(item) for name, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def checked_body(body: object, where: str, field: str) -> str | Messages:
    """Text, or a list of messages. Raises UserError if it is neither."""
    if isinstance(body, str):
        return body
    if isinstance(body, list) and body and all(is_message(message) for message in body):
        return body
    raise UserError(
        f'{where}: field "{field}" is {json.dumps(body, default=str)[:60]}, neither text nor a list of messages with "role" and "content"'
    )


def checked_tools(tools: object, where: str) -> Tools | None:
    """A list of descriptions, or the JSON of one. Raises UserError if it is neither."""
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f'{where}: field "tools" is not JSON ({error})') from error
    if not tools:
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    raise UserError(
        f'{where}: field "tools" is {json.dumps(tools, default=str)[:60]}, not a list of descriptions of tools'
    )


def is_message(message: object) -> bool:
    """Whether it has a role. What else a message must have is for its template to say."""
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def no_field(field: str, names: Iterable[str]) -> str:
    return f'no field "{field}" (has: {", ".join(json.dumps(name, ensure_ascii=False) for name in names)})'


def utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the record") from error
