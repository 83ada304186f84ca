"""Files with one JSON object a line as documents; they may be compressed."""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow

from data.cache import cached
from data.file_set import FileSet
from data.record_files import Records
from data.records import parse_record
from data.waiting import Waiting
from errors import UserError

# The index of the lines of a file of at least this many bytes is kept in the cache.
INDEXED_BYTES = 16 * 2**20

READ_BYTES = 2**20  # at a time


@contextlib.contextmanager
def _zstandard(path: Path) -> Iterator[pyarrow.NativeFile]:
    with path.open("rb") as opened, pyarrow.CompressedInputStream(opened, "zstd") as file:
        yield file


# Suffix of a file -> name of its compression, and what opens it.
COMPRESSIONS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".gz": ("gzip", gzip.open),
    ".zst": ("zstd", _zstandard),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
}


class JsonLines(Records):
    """Files with one JSON object a line, read record by record.

    Only the offsets of the lines are in memory; of a large file they are in the cache, as is the
    content of a compressed one.
    """

    kind = "jsonl"

    def __init__(self, spec: str, files: FileSet, fields: tuple[str, ...]):
        self._contents: list[Callable[[], BinaryIO]] = []
        # For each file, what returns [2, lines]: number and offset of every line that is not blank.
        self._lines: list[Callable[[], np.ndarray]] = []
        super().__init__(spec, files, fields)

    def _open_file(self, path: Path) -> int:
        """Finds the lines of a file that are not blank, and returns their number."""
        content = self._decompressed(path) if path.suffix in COMPRESSIONS else path
        if isinstance(content, bytes):
            self._contents.append(functools.partial(io.BytesIO, content))
            lines = _in_memory(_find_lines(io.BytesIO(content), path))
        else:
            self._contents.append(functools.partial(content.open, "rb"))
            lines = _lines_of(content, path)
        self._lines.append(lines)
        return lines().shape[1]

    def _decompressed(self, path: Path) -> bytes | Path:
        """Returns what a compressed file has: itself, or a file of it if it is long."""
        if path.stat().st_size <= self._memory_left:
            chunks, size = [], 0
            for chunk in decompress(path):
                chunks.append(chunk)
                size += len(chunk)
                if size > self._memory_left:
                    break
            else:
                self._memory_left -= size
                return b"".join(chunks)

        def write(to: Path) -> None:
            with to.open("wb") as file:
                file.writelines(decompress(path))

        return cached(path, "decompressed 1", write)

    def _read_record(self, file: int, record: int, where: str) -> dict[str, object]:
        with self._contents[file]() as opened:
            opened.seek(int(self._lines[file]()[1, record]))
            return parse_record(opened.readline(), where, self._fields)

    def _record_number(self, file: int, record: int) -> int:
        return int(self._lines[file]()[0, record])


def decompress(path: Path) -> Iterator[bytes]:
    """Yields the content of a compressed file. Raises UserError if it is not whole."""
    name, opener = COMPRESSIONS[path.suffix]
    waiting, done = Waiting(f"decompressing {path}"), 0
    try:
        with opener(path) as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
                done += len(chunk)
                waiting.update(done >> 20, "MB")
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: not a whole {name} file ({error})") from error


def _lines_of(content: Path, path: Path) -> Callable[[], np.ndarray]:
    """Returns what returns the lines of a file as `_find_lines` does.

    If the file is large they are in the cache.

    Args:
      content: the file.
      path: what a person knows it by.
    """

    def write(to: Path) -> None:
        with content.open("rb") as opened, to.open("wb") as index:
            np.save(index, _find_lines(opened, path))

    if content.stat().st_size < INDEXED_BYTES:
        with content.open("rb") as opened:
            return _in_memory(_find_lines(opened, path))
    return functools.partial(_open_index, cached(content, "lines 1", write))


def _in_memory(lines: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: lines


@functools.lru_cache(maxsize=128)  # an index is an open file, of which a process may have 1,000
def _open_index(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _find_lines(opened: BinaryIO, path: Path) -> np.ndarray:
    """Returns number (from 1) and offset of every line that is not blank, int64 [2, lines]."""
    numbers, offsets, offset = array("q"), array("q"), 0
    waiting = Waiting(f"indexing {path}")
    for number, line in enumerate(opened, 1):
        if line.strip() and line.strip() != b"\xef\xbb\xbf":  # an empty line with the UTF-8 mark
            numbers.append(number)
            offsets.append(offset)
        offset += len(line)
        if number % 10_000 == 0:
            waiting.update(offset >> 20, "MB")
    return np.array([numbers, offsets], np.int64).reshape(2, -1)
