"""Files that match a pattern, under names that stay the same when the whole folder moves."""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError


@dataclass(frozen=True)
class FileSet:
    """Sorted names, relative to `root`; the names decide the split, so a corpus may be copied
    elsewhere and keep its held-out files.
    """

    root: Path
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        return self.root / name


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Which file an element is in, and its index there; `ends` says how many elements come before
    the end of each file.
    """
    file = int(np.searchsorted(ends, index, side="right"))
    return file, index - (int(ends[file - 1]) if file else 0)


def match_files(spec: str, pattern: str) -> FileSet:
    """Files that match `pattern`; ** crosses folders. The root is the folder before the first
    wildcard. Raises UserError if none does.
    """
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UserError(f'data.sources: no file matches "{spec}" (looked from {Path.cwd()})')
    fixed = []
    for part in Path(pattern).parent.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    return FileSet(root, tuple(path.relative_to(root).as_posix() for path in paths))
