"""Checkpoints of training runs: written in the background, restored onto any mesh.

A checkpoint has the state and the data cursor, saved at the same step. This is Orbax, with the
errors of disks and of checkpoints that do not fit in one line each.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointHandler, CheckpointRestore, CheckpointSave
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_manager import StepAlreadyExistsError

from checkpoints.chunking import save_args
from checkpoints.disk_errors import disk_errors, reason_of
from checkpoints.trees import Spec, difference_between, specs
from errors import UserError

# Orbax logs each failure of its threads with a traceback, besides raising it. One error is reported
# once, by us.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
warnings.filterwarnings("ignore", module="orbax")

# Replicas share the writing of an array if each gets this much of it. Orbax shares out every array,
# and compiles each slice of each while training waits.
SLICE_BYTES = 16 * 2**20


class Cursor(Protocol):
    """A place in the data, as grain's iterators have it. Its state is bytes or JSON."""

    def get_state(self) -> Any:
        """Returns the place."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a place."""
        ...


class _CursorState:
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


class Checkpoints:
    """The checkpoints of one run: `directory/<step>`, each of them whole or not there at all.

    The process that trains has one of these, or each of the processes that do. To read the
    parameters of another run there is `restore_parameters`.

    Args:
      directory: where they go, created if need be.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        try:
            self._manager = _open(
                self.directory, max_to_keep=keep, create=True, cleanup_tmp_directories=True
            )
        except OSError as failure:
            raise UserError(
                f"{self.directory}: cannot keep checkpoints there: {reason_of(failure)}"
            ) from failure
        self._current: int | None = None  # the step this run last saved or restored

    def save(self, step: int, state: Any, cursor: Cursor | None = None) -> None:
        """Starts to save, and returns once the arrays are copied to the host.

        They may be donated, and the cursor moved, right away. A step that this run has just saved
        or restored is not saved again. If the save before is still running, this waits for it.

        Args:
          step: optimizer steps done.
          state: pytree of arrays.
          cursor: the data iterator; its state is taken now. Each process saves its own.

        Raises:
          UserError: the save before failed, or this one cannot start, or another run has saved this
            step.
        """
        if step == self._current:
            return
        items: dict[str, Any] = {
            "state": ocp.args.PyTreeSave(state, save_args=jax.tree.map(save_args, state))
        }
        if cursor is not None:
            items["cursor"] = CheckpointSave(_CursorState(_to_bytes(cursor.get_state())))
        with disk_errors(self._clean_up):
            try:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            except StepAlreadyExistsError:
                raise UserError(
                    f"{self.directory / str(step)}: there already, saved by another run;"
                    " use another --workdir, or delete it"
                ) from None
        self._current = step

    def restore(
        self, abstract_state: Any, cursor: Cursor | None = None, step: int | None = None
    ) -> Any:
        """Reads a checkpoint, whatever mesh it was saved from, and moves the cursor with it.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with the shardings that it gets;
            without one, a leaf goes to the default device.
          cursor: the data iterator to move.
          step: the checkpoint to read; None for the newest.

        Returns:
          A pytree like abstract_state, every array bit by bit what was saved.

        Raises:
          UserError: no checkpoint, or one that does not fit the state or the number of processes.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            place = self.directory if step is None else self.directory / str(step)
            raise UserError(f"{place}: no checkpoint there")
        state = _restore_state(self._manager, self.directory, step, abstract_state)
        if cursor is not None:
            cursor.set_state(
                _restore_cursor(self._manager, self.directory / str(step), like=cursor.get_state())
            )
        self._current = step
        return state

    def latest(self) -> int | None:
        """Returns the newest step that is whole on the disk, or None when there is none."""
        self.wait()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits for the save that is running. Raises UserError if it failed."""
        with disk_errors(self._clean_up):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save that is running and ends the threads.

        Raises UserError if it failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else the error that ended the run is the one to see
                raise

    def _clean_up(self, reason: str) -> str:
        """Removes what is half written, which may be what filled the disk.

        Returns the line of error for a failure of the disk.
        """
        self._current = newest = self._manager.latest_step()
        if jax.process_index() == 0 and self.directory.exists():
            for half_written in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        if newest is None:
            rest = "nothing is saved yet"
        else:
            rest = f"the newest good checkpoint is step {newest}"
        return f"{self.directory}: cannot write a checkpoint: {reason} ({rest})"


def restore_parameters(path: Path, abstract: Any) -> Any:
    """Reads the parts of a run's newest checkpoint that a forward pass needs.

    The optimizer's state is not read.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      abstract: dict or struct, the parts of the state to read (its fields `params` and `router`),
        as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      A pytree like abstract.

    Raises:
      UserError: no checkpoint there, or one that does not fit.
    """
    with open_checkpoint(path) as (manager, directory, step):
        return _restore_state(manager, directory, step, abstract, partial=True)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[ocp.CheckpointManager, Path, int]]:
    """Yields Orbax's manager, the directory of checkpoints and the step that `path` means.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Raises:
      UserError: no checkpoint there.
    """
    directory, step = path, None
    if directory.name.isdigit() and (directory / "state").exists():
        directory, step = directory.parent, int(directory.name)
    elif (directory / "checkpoints").exists():
        directory = directory / "checkpoints"
    if not directory.exists():
        raise UserError(f"{path}: no checkpoint there")
    manager = _open(directory, create=False)
    try:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{path}: no checkpoint there")
        yield manager, directory, step
    finally:
        manager.close()


def _open(directory: Path, **options: Any) -> ocp.CheckpointManager:
    """Opens the checkpoints of a directory, with handlers for the state and the data's cursor."""
    types = ocp.type_handlers.create_type_handler_registry(
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES),
        ),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (np.number, ocp.type_handlers.ScalarHandler()),
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=types),
        "cursor": CheckpointHandler(),
    }
    return ocp.CheckpointManager(
        directory.resolve(), item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def _restore_state(
    manager: ocp.CheckpointManager, directory: Path, step: int, abstract: Any, partial: bool = False
) -> Any:
    """Returns the state of a checkpoint; `partial`: the parts of it that `abstract` has.

    Raises UserError if the checkpoint does not fit.
    """
    there, here = specs(array_records(manager, step)), specs(abstract)
    if partial:
        there = _parts_of(there, here)
    if difference := difference_between(there, here):
        raise UserError(f"{directory / str(step)}: {difference}")

    default = SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        ),
        abstract,
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    args = ocp.args.PyTreeRestore(item=placed, restore_args=restore_args, partial_restore=partial)
    restored: Any = manager.restore(step, args=ocp.args.Composite(state=args))
    return restored.state


def array_records(manager: ocp.CheckpointManager, step: int) -> Any:
    """Returns the tree of Orbax's records of the arrays of a checkpoint."""
    metadata: Any = manager.item_metadata(step)
    return metadata.state.tree


def _parts_of(there: dict[str, Spec], here: dict[str, Spec]) -> dict[str, Spec]:
    """Returns what a checkpoint has of the parts of the state that are read.

    Parameters alone may be stored in bfloat16 (launch.convert --dtype=bfloat16); Orbax makes
    float32 of them.
    """
    parts = {name.split("/")[0] for name in here}
    there = {name: spec for name, spec in there.items() if name.split("/")[0] in parts}
    return there | {
        name: (shape, "float32")
        for name, (shape, dtype) in there.items()
        if dtype == "bfloat16" and here.get(name, ((), ""))[1] == "float32"
    }


def _restore_cursor(manager: ocp.CheckpointManager, checkpoint: Path, like: Any) -> Any:
    """Returns the state of this process's cursor, as bytes or as JSON, whichever `like` is."""
    here = jax.process_count()
    files = (checkpoint / "cursor").glob("*-of-*.json")
    counts = {int(file.stem.split("-of-")[1]) for file in files}
    if not counts:
        raise UserError(f"{checkpoint}: saved without a data cursor")
    if here not in counts:
        raise UserError(
            f"{checkpoint}: saved by {counts.pop()} processes, this run has {here};"
            " the data cursor needs as many"
        )
    cursor = _CursorState()
    manager.restore(int(checkpoint.name), args=ocp.args.Composite(cursor=CheckpointRestore(cursor)))
    return cursor.state if isinstance(like, bytes) else json.loads(cursor.state)


def _to_bytes(state: Any) -> bytes:
    return state if isinstance(state, bytes) else json.dumps(state).encode()
