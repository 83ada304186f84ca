"""Files of many records as documents: what their formats share.

The name of its file and its index in the file decide the split of a record: nothing is read for
that, and appending to a file moves no record. Where the field that is read has a conversation, a
field "tools" of the same record may have the functions that the assistant may call. Where two
fields are read, they are the conversations of a pair (data/pairs.py).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.documents import BadRecord, Document
from data.file_set import FileSet, locate, readable
from data.pairs import PROMPT, checked_pair
from data.records import checked_body, checked_tools, without_surrogates

# Bytes of a source that is not plain text (compressed, or columns) that stay in memory. What is
# beyond is read from a file of data/cache.py.
MEMORY_BYTES = 32 * 2**20


WHOLE = ("",)  # the fields of records that are texts, and have none


class Records:
    """A source (`data.documents.Source`) of records by index.

    A subclass sets `kind` and implements `_open_file` and `_read_record`.
    """

    kind: str
    validation_share: float | None = None

    def __init__(self, spec: str, files: FileSet, fields: tuple[str, ...]):
        """Opens every file.

        Args:
          spec: the source string.
          files: the files, all of this format.
          fields: the field of a record that has its text or its messages; or the two that have the
            messages of a pair, what is chosen and what is rejected.

        Raises:
          UserError: a file is not of this format.
        """
        self.spec = spec
        self._files = files
        self._fields = fields
        self._memory_left = MEMORY_BYTES
        counts = []
        for name in files.names:
            with readable(files.path(name)):
                counts.append(self._open_file(files.path(name)))
        self._cumulative_counts = np.cumsum(counts)  # records up to the end of each file

    def __len__(self) -> int:
        return int(self._cumulative_counts[-1])

    def key(self, index: int) -> str:
        """Returns the file's name and the record's index in it, which decide its split."""
        file, record = locate(self._cumulative_counts, index)
        return f"{self._files.names[file]}:{record}"

    def __getitem__(self, index: int) -> Document:
        """Reads a record. Raises BadRecord if it has no text, no conversation and no pair."""
        file, record = locate(self._cumulative_counts, index)
        name = f"{self._files.names[file]}:{self._record_number(file, record)}"
        where = str(self._files.root / name)
        with readable(self._files.path(self._files.names[file])):
            values = self._read_record(file, record, where)
        try:
            field, *more = self._fields
            if more:
                return self._pair(values, name, where)
            content, replaced = without_surrogates(values[field])
            content = checked_body(content, where, field)
            if isinstance(content, str):
                return Document(name, content, replaced=replaced)
            described, also_replaced = without_surrogates(values.get("tools"))
            tools = checked_tools(described, where)
            return Document(name, content, tools=tools, replaced=replaced + also_replaced)
        except RecursionError as error:
            raise BadRecord(f"{where}: nested too deeply") from error

    def _pair(self, values: Mapping[str, object], name: str, where: str) -> Document:
        """Makes a document of the fields of a pair. Raises BadRecord if it is none."""
        wanted = {field: values.get(field) for field in (*self._fields, PROMPT, "tools")}
        wanted, replaced = without_surrogates(wanted)
        chosen, rejected = checked_pair(wanted, self._fields, where)
        tools = checked_tools(wanted["tools"], where)
        return Document(name, chosen, tools=tools, replaced=replaced, rejected=rejected)

    def _open_file(self, path: Path) -> int:
        """Opens the next file and returns the number of its records."""
        raise NotImplementedError

    def _read_record(self, file: int, record: int, where: str) -> dict[str, object]:
        """Returns the fields of a record by name, none of them checked yet.

        Those that are asked for are there; "tools", and the prompt of a pair, where it has them.

        Args:
          file: index of the file.
          record: index of the record in the file.
          where: path of the file and number of the record, for errors to begin with.

        Raises:
          BadRecord: the record is broken.
        """
        raise NotImplementedError

    def _record_number(self, file: int, record: int) -> int:
        """Returns the number, from 1, by which people find a record in its file."""
        return record + 1
