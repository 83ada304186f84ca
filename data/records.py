"""Files of many records as documents: JSON lines, Parquet, ArrayRecord.

The name of its file and its index in the file decide the split of a record: nothing is read for
that, and appending to a file moves no record. Where the field that is read has a conversation, a
field "tools" of the same record may have the functions that the assistant may call.
"""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from data.documents import Document, Messages, Tools
from data.file_set import FileSet, locate
from errors import UserError


class Records:
    """The part that the formats share: a source (`data.documents.Source`) of records by index.

    A subclass sets `kind` and implements `_open_file` and `_read_record`.
    """

    kind: str
    validation_share: float | None = None

    def __init__(self, spec: str, files: FileSet, field: str):
        """Opens every file.

        Args:
          spec: the source string.
          files: the files, all of this format.
          field: the field of a record that has its text or its messages.

        Raises:
          UserError: a file is not of this format.
        """
        self.spec = spec
        self._files = files
        self._field = field
        counts = [self._open_file(files.path(name)) for name in files.names]
        self._cumulative_counts = np.cumsum(counts)  # records up to the end of each file

    def __len__(self) -> int:
        return int(self._cumulative_counts[-1])

    def key(self, index: int) -> str:
        """Returns the file's name and the record's index in it, which decide its split."""
        file, record = locate(self._cumulative_counts, index)
        return f"{self._files.names[file]}:{record}"

    def __getitem__(self, index: int) -> Document:
        file, record = locate(self._cumulative_counts, index)
        name = f"{self._files.names[file]}:{self._record_number(file, record)}"
        where = str(self._files.root / name)
        body, tools = self._read_record(file, record, where)
        body = checked_body(body, where, self._field)
        tools = None if isinstance(body, str) else checked_tools(tools, where)
        return Document(name, body, tools=tools)

    def _open_file(self, path: Path) -> int:
        """Opens the next file and returns the number of its records."""
        raise NotImplementedError

    def _read_record(self, file: int, record: int, where: str) -> tuple[object, object]:
        """Returns the body of a record and its tools or None, neither of them checked yet.

        Args:
          file: index of the file.
          record: index of the record in the file.
          where: path of the file and number of the record, for errors to begin with.
        """
        raise NotImplementedError

    def _record_number(self, file: int, record: int) -> int:
        """Returns the number, from 1, by which people find a record in its file."""
        return record + 1


class JsonLines(Records):
    """Files with one JSON object a line.

    A plain file is read record by record: only the offsets of its lines are in memory. A .gz file
    has no random access, so it is decompressed into memory.
    """

    kind = "jsonl"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._contents: list[Callable[[], BinaryIO]] = []
        # For each file, [2, lines]: number and offset of every line that is not blank.
        self._lines: list[np.ndarray] = []
        super().__init__(spec, files, field)

    def _open_file(self, path: Path) -> int:
        """Finds the lines of a file that are not blank, and returns their number."""
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

    def _read_record(self, file: int, record: int, where: str) -> tuple[object, object]:
        with self._contents[file]() as opened:
            opened.seek(int(self._lines[file][1, record]))
            return parse_record(opened.readline(), where, self._field)

    def _record_number(self, file: int, record: int) -> int:
        return int(self._lines[file][0, record])


class ParquetColumn(Records):
    """One column of Parquet files, and the column "tools" beside conversations.

    The columns are in memory, as Arrow tables.
    """

    kind = "parquet"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._tables: list[pyarrow.Table] = []
        super().__init__(spec, files, field)

    def _open_file(self, path: Path) -> int:
        """Reads the columns that are needed, and returns the number of rows."""
        try:
            schema = pyarrow.parquet.read_schema(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        if self._field not in schema.names:
            raise UserError(f"{path}: {missing_field(self._field, schema.names)}")
        columns = {self._field}
        if pyarrow.types.is_nested(schema.field(self._field).type) and "tools" in schema.names:
            columns.add("tools")
        self._tables.append(pyarrow.parquet.read_table(path, columns=list(columns)))
        return len(self._tables[-1])

    def _read_record(self, file: int, record: int, where: str) -> tuple[object, object]:
        table = self._tables[file]
        body, tools = (
            without_nulls(table[name][record].as_py()) if name in table.column_names else None
            for name in (self._field, "tools")
        )
        return body, tools


class ArrayRecords(Records):
    """ArrayRecord files, read by grain.

    A record is UTF-8 text, or a JSON object if there is a field to read.
    """

    kind = "arrayrecord"

    def __init__(self, spec: str, files: FileSet, field: str):
        self._readers: list[Any] = []
        super().__init__(spec, files, field)

    def _open_file(self, path: Path) -> int:
        import grain  # it brings jax, which no other source needs

        try:
            self._readers.append(grain.sources.ArrayRecordDataSource([str(path)]))
            return len(self._readers[-1])
        except Exception as error:  # the reader raises whatever its C++ side throws
            raise UserError(f"{path}: not an ArrayRecord file ({error})") from error

    def _read_record(self, file: int, record: int, where: str) -> tuple[object, object]:
        content = self._readers[file][record]
        if self._field:
            return parse_record(content, where, self._field)
        return decode_utf8(content, where), None


RECORD_FORMATS: dict[str, type[Records]] = {
    records.kind: records for records in (JsonLines, ParquetColumn, ArrayRecords)
}


def parse_record(line: bytes, where: str, field: str) -> tuple[object, object]:
    """Returns `field` of a JSON object, and its "tools" or None.

    Raises:
      UserError: `line` is not a JSON object, or lacks the field; the error begins with `where`.
    """
    try:
        record = json.loads(decode_utf8(line, where))
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON {type(record).__name__}, not an object with a field "
            f"{json.dumps(field)}"
        )
    if field not in record:
        raise UserError(f"{where}: {missing_field(field, record)}")
    return record[field], record.get("tools")


def without_nulls(value: object) -> object:
    """Drops the fields of an Arrow value that are null, at every depth.

    All structs of a column have the fields that any of them has, so that a null there means no more
    than that the field is absent.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def checked_body(body: object, where: str, field: str) -> str | Messages:
    """Returns `body` if it is text or a list of messages.

    Raises:
      UserError: it is neither; the error begins with `where`.
    """
    if isinstance(body, str):
        return body
    if isinstance(body, list) and body and all(is_message(message) for message in body):
        return body
    raise UserError(
        f'{where}: field "{field}" is {json.dumps(body, default=str)[:60]}, neither text nor a '
        'list of messages with "role" and "content"'
    )


def checked_tools(tools: object, where: str) -> Tools | None:
    """Returns a list of descriptions of tools, given as such or as its JSON, or None for no tools.

    Raises:
      UserError: `tools` is neither; the error begins with `where`.
    """
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
        f'{where}: field "tools" is {json.dumps(tools, default=str)[:60]}, not a list of '
        "descriptions of tools"
    )


def is_message(message: object) -> bool:
    """Returns whether an object has a role; a chat template says what else a message must have."""
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def missing_field(field: str, names: Iterable[str]) -> str:
    """Writes the part of an error that names a missing field and those that are there."""
    found = ", ".join(json.dumps(name, ensure_ascii=False) for name in names)
    return f'no field "{field}" (has: {found})'


def decode_utf8(content: bytes, where: str) -> str:
    """Decodes a record. Raises UserError, beginning with `where`, if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the record") from error
