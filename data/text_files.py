"""Text files as documents; long files are cut into chunks at the ends of lines."""

import os
from typing import BinaryIO

import numpy as np

from data.documents import BadRecord, Document
from data.file_set import FileSet, locate, readable
from data.waiting import Waiting
from errors import UserError


class TextFiles:
    """A source (`data.documents.Source`) of UTF-8 files, one document each or several chunks.

    A file is cut near every multiple of `chunk_bytes`: after the last end of line before it, or
    between two characters if that line is longer than `chunk_bytes`. So the chunks follow from the
    sizes of the files without reading them, and each has fewer than 2 * chunk_bytes bytes. All
    chunks of a file are in one split.
    """

    validation_share: float | None = None

    def __init__(self, spec: str, kind: str, files: FileSet, chunk_bytes: int):
        """Looks up the sizes of `files`, which must exist.

        Args:
          spec: the source string, of which `kind` is the part before the colon.
          kind: "text" or "stdlib".
          files: the files, of which empty ones give no document.
          chunk_bytes: size of a chunk, about; at least 4, the bytes of the longest character.
        """
        self.spec, self.kind = spec, kind
        self._files = files
        self._chunk_bytes = chunk_bytes
        self._sizes = np.array(_sizes(files), np.int64)
        # Chunks up to the end of each file.
        self._cumulative_counts = np.cumsum(-(-self._sizes // chunk_bytes))

    def __len__(self) -> int:
        return int(self._cumulative_counts[-1])

    def key(self, index: int) -> str:
        """Returns the name of the file, which decides the split of all of its chunks."""
        return self._files.names[locate(self._cumulative_counts, index)[0]]

    def __getitem__(self, index: int) -> Document:
        """Reads one chunk of a file; raises BadRecord where it is not UTF-8."""
        file_index, chunk = locate(self._cumulative_counts, index)
        name, size = self._files.names[file_index], int(self._sizes[file_index])
        path = self._files.path(name)
        with readable(path), path.open("rb") as file:
            start = self._chunk_start(file, size, chunk)
            stop = self._chunk_start(file, size, chunk + 1)
            file.seek(start)
            content = file.read(stop - start)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(
                f"{path}: not UTF-8 at byte {start + error.start}; convert the file, or leave it "
                "out of data.sources"
            ) from error
        return Document(
            name if size <= self._chunk_bytes else f"{name}[{chunk}]",
            text,
            begins=start == 0,
            ends=stop == size,
        )

    def _chunk_start(self, file: BinaryIO, size: int, chunk: int) -> int:
        """Returns the byte at which a chunk begins.

        It is above (chunk - 1) * chunk_bytes and at most chunk * chunk_bytes, so that no chunk is
        empty.
        """
        limit = chunk * self._chunk_bytes
        if limit == 0 or limit >= size:
            return min(limit, size)
        file.seek(limit - self._chunk_bytes)
        window = file.read(self._chunk_bytes + 1)
        end_of_line = window.rfind(b"\n", 0, self._chunk_bytes)
        if end_of_line >= 0:
            return limit - self._chunk_bytes + end_of_line + 1
        # The line is too long: step back to the first byte of a character. A UTF-8 byte 10xxxxxx
        # continues a character that began up to three bytes before it.
        back = next(
            (back for back in range(4) if window[self._chunk_bytes - back] & 0xC0 != 0x80), 0
        )
        return limit - back


def _sizes(files: FileSet) -> list[int]:
    """Returns the bytes of each file."""
    waiting, root, sizes = Waiting(f"opening the files of {files.root}"), str(files.root), []
    for name in files.names:
        try:
            sizes.append(os.stat(os.path.join(root, name)).st_size)
        except FileNotFoundError as error:  # removed since it was listed
            raise UserError(f"{files.path(name)}: no such file") from error
        waiting.update(len(sizes), "files", len(files.names))
    return sizes
