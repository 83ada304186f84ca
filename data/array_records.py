"""ArrayRecord files as documents."""

from pathlib import Path
from typing import Any

from data.documents import BadRecord
from data.file_set import FileSet
from data.record_files import WHOLE, Records
from data.records import decode_utf8, parse_record
from errors import UserError


class ArrayRecords(Records):
    """ArrayRecord files, read by grain.

    A record is UTF-8 text, or a JSON object if there is a field to read.
    """

    kind = "arrayrecord"

    def __init__(self, spec: str, files: FileSet, fields: tuple[str, ...]):
        self._readers: list[Any] = []
        super().__init__(spec, files, fields)

    def _open_file(self, path: Path) -> int:
        import grain  # it brings jax, which no other source needs

        try:
            self._readers.append(grain.sources.ArrayRecordDataSource([str(path)]))
            return len(self._readers[-1])
        except Exception as error:  # the reader raises whatever its C++ side throws
            raise UserError(f"{path}: not an ArrayRecord file ({error})") from error

    def _read_record(self, file: int, record: int, where: str) -> dict[str, object]:
        try:
            content = self._readers[file][record]
        except Exception as error:  # as above: a damaged chunk
            raise BadRecord(f"{where}: cannot be read ({error})") from error
        if self._fields == WHOLE:
            return {"": decode_utf8(content, where)}
        return parse_record(content, where, self._fields)
