"""Files that a source reads, under names that stay the same when the whole folder moves."""

import contextlib
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.waiting import Waiting
from errors import UserError

# Folders of the standard library that are left out: its tests and vendored copies are numerous
# and unlike ordinary code, and installed packages are not part of it.
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
}


@dataclass(frozen=True)
class FileSet:
    """A folder and the names of files in it.

    The names decide the split of documents, so that a copy of a corpus elsewhere keeps its
    validation files.

    Attributes:
      root: the folder.
      names: sorted paths relative to `root`, with forward slashes.
    """

    root: Path
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        """Returns the path of the file of this name."""
        return self.root / name


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to read `path` inside into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def locate(cumulative_counts: np.ndarray, index: int) -> tuple[int, int]:
    """Finds the file that holds an element of a list of files.

    Args:
      cumulative_counts: for each file, the number of elements in it and in all files before it.
      index: index of the element among those of all files.

    Returns:
      (file, index of the element in that file).
    """
    file = int(np.searchsorted(cumulative_counts, index, side="right"))
    return file, index - (int(cumulative_counts[file - 1]) if file else 0)


def match_files(spec: str, pattern: str) -> FileSet:
    """Lists the files that match a glob pattern, in which ** crosses folders.

    Args:
      spec: the source string that has the pattern, for the error.
      pattern: relative to the working directory. The root is the folder before its first wildcard.

    Raises:
      UserError: no file matches.
    """
    waiting, found = Waiting(f"looking for {spec}"), []
    for path in glob.iglob(pattern, recursive=True):
        if os.path.isfile(path):
            found.append(Path(path))
        waiting.update(len(found), "files")
    if not found:
        raise UserError(f'data.sources: no file matches "{spec}" (looked from {Path.cwd()})')
    fixed = []
    for part in Path(pattern).parent.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    depth = len(root.parts)
    return FileSet(root, tuple("/".join(path.parts[depth:]) for path in sorted(found)))


def stdlib_files() -> FileSet:
    """Lists the Python files of the running Python's standard library.

    Its tests and installed packages are left out.
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
