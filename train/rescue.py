"""An error in the middle of a run does not cost the steps since the last checkpoint."""

from types import TracebackType
from typing import Any

import jax
from jax import Array

from checkpoints.cursors import Place
from checkpoints.training import Checkpoints
from errors import UserError


class SavedOnError:
    """Saves the newest state of a run when an error ends what is inside.

        with SavedOnError(checkpoints) as newest:
            for step in ...:
                state = ...
                newest.is_at(step, state, Place.of(stream))

    With several processes nothing is saved: the error is that of one, and the others wait for its
    next step, not for a checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._newest: tuple[int, Any, Place | None] | None = None

    def is_at(self, step: int, state: Any, place: Place | None = None) -> None:
        """Notes that `step` is done, with its state and the place behind its batch, if any."""
        self._newest = step, state, place

    def __enter__(self) -> "SavedOnError":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or self._newest is None or jax.process_count() > 1:
            return
        step, state, place = self._newest
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, Array)):
            return  # a step that fails has taken the buffers of the state before it
        try:
            self._checkpoints.save(step, state, place)
            self._checkpoints.wait()
        except Exception:  # a full disk, say, of which the first error tells
            return
        saved = f"step {step} is saved"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {saved}") from error
        error.add_note(saved)
