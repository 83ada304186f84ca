"""One run writes to a workdir at a time: a lock names its host and process.

The lock is a file of the workdir, so that it holds for every host that shares it. A process on the
same machine is alive if its id is; of another machine one can see only that it touches the file now
and then. Both are judged without the clock, which hosts need not agree on.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

LOCK = "lock.json"
BEAT_SECONDS = 5  # between two touches of the file
TAKE_OVER_SECONDS = 30  # another machine's lock is stale if it is not touched for so long


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs from writing to `workdir`. All processes of a run must call it alike.

    Raises:
      UserError: another run holds the lock, or the workdir cannot be written.
    """
    import jax

    from checkpoints.agreement import first_told

    held, refusal = None, None
    if jax.process_index() == 0:
        try:
            held = _Lock(workdir / LOCK)
        except UserError as error:
            refusal = str(error)
    try:
        if refusal := first_told(refusal):
            raise UserError(refusal)
        yield
    finally:
        if held is not None:
            held.release()


class _Lock:
    """A lock that this process holds from the moment it is made."""

    def __init__(self, path: Path):
        self._path, self._owner = path, this_process()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._made():
                _remove_stale(path)
        except OSError as failure:
            raise UserError(f"{path}: cannot write: {failure.strerror}") from failure
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Removes the file, unless another run has taken it over."""
        self._released.set()
        if _owner_of(self._path) == self._owner:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _made(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            file.write(json.dumps(self._owner) + "\n")
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)
            owner = _owner_of(self._path)
            if owner not in (None, self._owner) and not self._released.is_set():
                # Two would overwrite each other. This one was believed dead: it stood still.
                line = f"error: {self._path}: {_described(owner)} has taken this workdir over"
                print(line, file=sys.stderr, flush=True)
                os._exit(2)


def this_process() -> dict[str, Any]:
    """Returns what tells this process from all others, on this and on other machines."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "run": uuid.uuid4().hex,
    }


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Returns whether a process lives; None where it is on another machine."""
    if owner.get("machine") != _machine():
        return None
    pid = owner["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == owner.get("started")


def _remove_stale(path: Path) -> None:
    """Removes the lock of a run that is dead. Raises UserError if the run lives."""
    owner = _owner_of(path)
    if owner is None:  # it is being written at this moment, or its writer died there
        time.sleep(1)
        owner = _owner_of(path)
    alive = is_alive(owner) if owner else False
    if alive is None:
        line = f"{path.parent}: {_described(owner)} wrote there; waiting to see whether it lives"
        print(line, file=sys.stderr, flush=True)
        alive = _is_touched(path)
    if alive:
        raise UserError(
            f"{path.parent}: another run writes there ({_described(owner)}); stop it, or choose "
            "another --workdir"
        )
    # Of two that come here at once, one must not remove what the other has made meanwhile.
    aside = path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _owner_of(aside) == owner:
        aside.unlink()
    else:
        aside.rename(path)


def _is_touched(path: Path) -> bool:
    """Returns whether somebody touches the file within TAKE_OVER_SECONDS, as soon as it is so."""
    first, until = _touched(path), time.monotonic() + TAKE_OVER_SECONDS
    while time.monotonic() < until:
        time.sleep(0.2)
        if _touched(path) != first:
            return path.exists()
    return False


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _owner_of(path: Path) -> dict[str, Any] | None:
    """Returns who wrote a lock, or None if there is none that can be read."""
    try:
        owner = json.loads(path.read_text())
        return owner if {"host", "pid"} <= owner.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _described(owner: dict[str, Any] | None) -> str:
    return f"host {owner['host']}, process {owner['pid']}" if owner else "an unknown process"


def _machine() -> str:
    """Returns what two processes share if they see each other's ids: a boot and a namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Returns when a process started, in ticks since the boot: a later one may have its id."""
    try:
        # The name in parentheses may have spaces and parentheses itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
