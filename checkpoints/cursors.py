"""The place in the data that a checkpoint has beside the state, one for each process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore

from errors import UserError

# No run reads so many documents: a larger number in a cursor is damage.
MOST = 2**48


class Cursor(Protocol):
    """A place in the data, as grain's iterators have it. Its state is bytes or JSON."""

    def get_state(self) -> Any:
        """Returns the place."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a place."""
        ...


class Place:
    """A cursor that stays where another was.

    Args:
      state: returns the state of that one, as it was.
    """

    def __init__(self, state: Callable[[], Any]):
        self._state = state

    @classmethod
    def of(cls, cursor: Cursor) -> "Place":
        """Returns the place where a cursor is now."""
        state = cursor.get_state()
        return cls(lambda: state)

    def get_state(self) -> Any:
        """Returns the place."""
        return self._state()

    def set_state(self, state: Any) -> None:
        """Moves to another place."""
        self._state = lambda: state


class SavedCursor:
    """A cursor at one moment, in the form that grain's handler writes and reads.

    There is one file for each process.
    """

    def __init__(self, state: bytes = b""):
        self.state = state

    def get_state(self) -> bytes:
        """Returns the cursor's state."""
        return self.state

    def set_state(self, state: bytes) -> None:
        """Keeps the state that was read."""
        self.state = state

    def start_prefetch(self) -> None:
        """Does nothing: grain's handler calls it, and bytes have nothing to prefetch."""


def restore_cursor(manager: ocp.CheckpointManager, checkpoint: Path, cursor: Cursor) -> None:
    """Moves a cursor to the place of this process in a checkpoint.

    Raises:
      UserError: there is none, or it is of another number of processes, or no place in these data.
    """
    here = jax.process_count()
    files = (checkpoint / "cursor").glob("*-of-*.json")
    counts = {file.stem.split("-of-")[1] for file in files}
    if not counts:
        raise UserError(f"{checkpoint}: saved without a data cursor")
    if str(here) not in counts:
        raise UserError(
            f"{checkpoint}: saved by {counts.pop()} processes, this run has {here};"
            " the data cursor needs as many"
        )
    saved = SavedCursor()
    like = cursor.get_state()
    try:
        args = ocp.args.Composite(cursor=CheckpointRestore(saved))
        manager.restore(int(checkpoint.name), args=args)
        state = saved.state if isinstance(like, bytes) else json.loads(saved.state)
        if wrong := _absurd(json.loads(saved.state), json.loads(to_bytes(like))):
            raise ValueError(wrong)
        cursor.set_state(state)
    except UserError:
        raise
    except Exception as failure:  # a damaged place fails wherever it is first used
        words = " ".join(str(failure).split())[:200] or type(failure).__name__
        raise UserError(
            f"{checkpoint}: its data cursor is no place in these data: {words}"
        ) from failure


def to_bytes(state: Any) -> bytes:
    """Returns the state of a cursor as it is saved."""
    return state if isinstance(state, bytes) else json.dumps(state).encode()


def _absurd(state: Any, like: Any) -> str | None:
    """Returns what is wrong with the numbers of a cursor, or None.

    Args:
      state: what was saved.
      like: the state of a cursor at its beginning, which may have a negative number where nothing
        has been read.
    """
    number = type(like) is int or type(state) is int
    if number and state != like and not (type(state) is int and 0 <= state < MOST):
        return f"{str(state)[:40]} is no number of documents"
    parts, theirs = _parts(state), _parts(like)
    wrongs = ((name, _absurd(item, theirs.get(name))) for name, item in parts.items())
    return next((f"{name}: {wrong}" for name, wrong in wrongs if wrong), None)


def _parts(state: Any) -> dict[Any, Any]:
    """Returns the parts of a dictionary by name, of a list by place, and of a number none."""
    if isinstance(state, list):
        return dict(enumerate(state))
    return state if isinstance(state, dict) else {}
