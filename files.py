"""Files appear whole or not at all, or grow by whole records; JSON is read with a line of error."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the caller writes there takes the name `path`.

    The caller may write a file or make a directory. If the body raises, the temporary is removed
    and `path` stays as it is. Several processes may write the same path at once: each has a
    temporary of its own, and the last rename wins.

    Args:
      path: the file or directory.
      durable: the name appears only after the contents of the file are on the disk, so that a
        machine that fails leaves no empty file of that name.

    Raises:
      UserError: the operating system refuses to write there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        (publish if durable else os.replace)(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink()


class AppendedFile:
    """A file that grows by whole records: what cannot be written whole leaves no part of it.

    Args:
      path: the file, created if need be, with its directory.

    Raises:
      UserError: it cannot be written, here and in `append`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, record: bytes) -> None:
        """Writes a record at the end, past Python and into the operating system."""
        try:
            size = os.fstat(self._file.fileno()).st_size
            written = 0
            try:
                while written < len(record):
                    written += self._file.write(record[written:])
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Closes the file. Nothing waits to be written, so that it cannot fail."""
        with contextlib.suppress(OSError):
            self._file.close()


def publish(temporary: Path, path: Path) -> None:
    """Gives a file its own name, once what was written under its temporary one is on the disk.

    Raises OSError.
    """
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a UTF-8 text file, whole or not at all. Raises UserError as `replacing` does."""
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int = 2, durable: bool = False) -> None:
    """Writes `value` as JSON, whole or not at all. Raises UserError as `replacing` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n", durable)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file is missing or is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(found).__name__}")
    return found


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot write: {error.strerror or error}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
