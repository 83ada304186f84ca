"""Source strings, as configs/base.py documents them, to documents."""

import difflib
import os
import sysconfig
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.config import SOURCE_KINDS
from data.documents import Document, Source
from data.files import FileSet, locate, match_files
from data.records import RECORDS
from data.tasks.source import TaskDocuments
from errors import UserError

# The standard library's tests and its vendored copies are many, long and odd; installed packages
# are not the standard library.
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
}


def open_source(spec: str, longest: int, *, chat: bool = False) -> Source:
    """Opens one of `data.sources`.

    Args:
      spec: "stdlib", "text:GLOB", "jsonl:GLOB#FIELD", "parquet:GLOB#FIELD",
        "arrayrecord:GLOB[#FIELD]" or "task:NAME?PARAMETERS".
      longest: bytes, at least 4; longer text files are cut into pieces of about this many, at the
        ends of lines.
      chat: problems of a task come as conversations.

    Raises UserError if the kind is unknown, no file matches, or there is no document in them.
    """
    kind, _, rest = spec.partition(":")
    if kind not in SOURCE_KINDS:
        nearest = difflib.get_close_matches(kind, SOURCE_KINDS, n=1)
        hint = (
            f'did you mean "{nearest[0]}"?' if nearest else f"known are {', '.join(SOURCE_KINDS)}"
        )
        raise UserError(f'data.sources: "{spec}" is of no known kind; {hint}')
    if kind == "stdlib":
        if rest:
            raise UserError(f'data.sources: "{spec}": write just "stdlib", it takes no pattern')
        source = TextFiles(spec, kind, stdlib_files(), longest)
    elif kind == "text":
        source = TextFiles(spec, kind, match_files(spec, rest), longest)
    elif kind == "task":
        source = TaskDocuments(spec, chat)
    else:
        pattern, _, field = rest.partition("#")
        if not field and kind != "arrayrecord":
            raise UserError(
                f'data.sources: "{spec}" does not say which field to read; write {kind}:{pattern or "GLOB"}#FIELD'
            )
        source = RECORDS[kind](spec, match_files(spec, pattern), field)
    if len(source) == 0:
        raise UserError(f'data.sources: "{spec}" matches only empty files')
    return source


def stdlib_files() -> FileSet:
    """Every Python file of the running Python's standard library, without tests and installed
    packages.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            for name in files
            if name.endswith(".py")
        ]
    return FileSet(root, tuple(sorted(names)))


class TextFiles:
    """UTF-8 files, one document each; the long ones are cut.

    A file is cut near every multiple of `longest` bytes: behind the last end of line before it, or
    between two characters if that line is longer than that. So a piece is found from the sizes of
    the files alone, without reading them, and is under 2 * longest bytes long. All pieces of a file
    are in one split.
    """

    validation_share = None

    def __init__(self, spec: str, kind: str, files: FileSet, longest: int):
        self.spec, self.kind = spec, kind
        self._files = files
        self._longest = longest
        self._sizes = np.array([files.path(name).stat().st_size for name in files.names])
        self._ends = np.cumsum(
            -(-self._sizes // longest)
        )  # how many pieces come before the end of each file; none in an empty one

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        return self._files.names[locate(self._ends, index)[0]]

    def __getitem__(self, index: int) -> Document:
        number, piece = locate(self._ends, index)
        name, size = self._files.names[number], int(self._sizes[number])
        path = self._files.path(name)
        with path.open("rb") as file:
            start = self._cut(file, size, piece)
            stop = self._cut(file, size, piece + 1)
            file.seek(start)
            content = file.read(stop - start)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 at byte {start + error.start}; convert the file, or leave it out of data.sources"
            ) from error
        return Document(
            name if size <= self._longest else f"{name}[{piece}]",
            text,
            begins=start == 0,
            ends=stop == size,
        )

    def _cut(self, file: BinaryIO, size: int, piece: int) -> int:
        """Byte at which a piece begins: above (piece - 1) * longest and at most piece * longest, so
        that no piece is empty.
        """
        at = piece * self._longest
        if at == 0 or at >= size:
            return min(at, size)
        file.seek(at - self._longest)
        window = file.read(self._longest + 1)
        end_of_line = window.rfind(b"\n", 0, self._longest)
        if end_of_line >= 0:
            return at - self._longest + end_of_line + 1
        back = next(
            (back for back in range(4) if window[self._longest - back] & 0xC0 != 0x80), 0
        )  # 10xxxxxx continues a character
        return at - back
