"""Checkpoints: the state and the data cursor, written together in the background, restored onto any
mesh.
"""

import json
import logging
import math
import os
import re
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

from errors import UserError

# Orbax logs each failure of its threads with a traceback, besides raising it: one error, said once,
# by us.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
warnings.filterwarnings("ignore", module="orbax")

# Replicas share the writing of an array if each gets this much of it. Orbax shares out every array,
# and compiles each slice of each while training waits.
SLICE_BYTES = 16 * 2**20
# The most that is compressed, and has to be read, as one piece; and the size below which a piece is
# not worth being one.
CHUNK_BYTES, LEAST_CHUNK_BYTES = 64 * 2**20, 2**20


class Cursor(Protocol):
    """A place in the data: what grain's iterators offer. The state is bytes or JSON."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class _Bytes:
    """A cursor at one moment, in the form grain's handler writes and reads: one file per
    process.
    """

    def __init__(self, state: bytes = b""):
        self.state = state

    def get_state(self) -> bytes:
        return self.state

    def set_state(self, state: bytes) -> None:
        self.state = state

    def start_prefetch(self) -> None:
        """Asked for by grain's handler; bytes have nothing to prefetch."""


class Checkpoints:
    """The checkpoints of one run: `directory/<step>`, each of them whole or not there at all.

    For the process (or processes) that trains; to read another run's parameters there is
    `restore_parameters`.

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
        """Starts to save, and returns once the arrays are copied to the host: they may be donated,
        and the cursor moved, right away.

        A step this run has just saved or restored is not saved again. Waits for the save before,
        should that still be running.

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
        items = {"state": ocp.args.PyTreeSave(state, save_args=jax.tree.map(_in_chunks, state))}
        if cursor is not None:
            items["cursor"] = CheckpointSave(_Bytes(_to_bytes(cursor.get_state())))
        with self._failures_named():
            try:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            except ocp.checkpoint_manager.StepAlreadyExistsError:
                raise UserError(
                    f"{self.directory / str(step)}: there already, saved by another run; use another --workdir, or delete it"
                ) from None
        self._current = step

    def restore(
        self, abstract_state: Any, cursor: Cursor | None = None, step: int | None = None
    ) -> Any:
        """Reads a checkpoint, whatever mesh it was saved from, and moves the cursor to where it
        was.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with the shardings it shall have;
            without one, a leaf goes to the default device.
          cursor: the data iterator to move.
          step: which; None for the newest.

        Returns:
          A pytree like abstract_state, every array bit by bit what was saved.

        Raises:
          UserError: no checkpoint, or one that does not fit the state or the number of processes.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise UserError(
                f"{self.directory if step is None else self.directory / str(step)}: no checkpoint there"
            )
        state = _restore_state(self._manager, self.directory, step, abstract_state)
        if cursor is not None:
            cursor.set_state(
                _restore_cursor(self._manager, self.directory / str(step), like=cursor.get_state())
            )
        self._current = step
        return state

    def latest(self) -> int | None:
        """The newest step that is whole on disk; None when there is none."""
        self.wait()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits for the save under way. Raises UserError if it failed."""
        with self._failures_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and ends the threads. Raises UserError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # what broke the run speaks first
                raise

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """A failure of the disk becomes one line, and what was half written is removed (it may be
        what filled the disk).
        """
        try:
            yield
        except (OSError, ValueError) as failure:
            reason = reason_of(failure)
            if reason is None:
                raise
            self._current = good = self._manager.latest_step()
            if jax.process_index() == 0 and self.directory.exists():
                for half_written in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(half_written, ignore_errors=True)
            rest = (
                "nothing is saved yet"
                if good is None
                else f"the newest good checkpoint is step {good}"
            )
            raise UserError(
                f"{self.directory}: cannot write a checkpoint: {reason} ({rest})"
            ) from failure


def restore_parameters(path: Path, abstract: Any) -> Any:
    """Reads what a forward pass needs, and no optimizer state, of the newest checkpoint of a run.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      abstract: dict or struct, the parts of the state to read (its fields `params` and `router`),
        as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      A pytree like abstract.

    Raises:
      UserError: no checkpoint there, or one that does not fit.
    """
    with opened(path) as (manager, directory, step):
        return _restore_state(manager, directory, step, abstract, partial=True)


@contextmanager
def opened(path: Path) -> Iterator[tuple[ocp.CheckpointManager, Path, int]]:
    """Orbax's manager, the directory of checkpoints and the step that `path` means, as in
    `restore_parameters`. Raises UserError: no checkpoint there.
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


def _in_chunks(leaf: Any) -> ocp.SaveArgs:
    """Cuts what a device holds of a large array into chunks, stacked matrices one from another:
    each is then compressed, and can be read, without the rest.
    """
    held = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else np.shape(leaf)
    if math.prod(held) * leaf.dtype.itemsize <= CHUNK_BYTES:
        return ocp.SaveArgs()
    stacked = [
        axis
        for axis in range(len(held) - 2)
        if math.prod(held[axis + 1 :]) * leaf.dtype.itemsize >= LEAST_CHUNK_BYTES
    ]
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(stacked))


def _restore_state(
    manager: ocp.CheckpointManager, directory: Path, step: int, abstract: Any, partial: bool = False
) -> Any:
    there, here = entries(manager.item_metadata(step).state.tree), entries(abstract)
    if partial:
        parts = {name.split("/")[0] for name in here}
        there = {name: array for name, array in there.items() if name.split("/")[0] in parts}
        # Parameters alone may be kept in bfloat16 (launch.convert --dtype=bfloat16); Orbax makes
        # float32 of them.
        there |= {
            name: (shape, "float32")
            for name, (shape, dtype) in there.items()
            if dtype == "bfloat16" and here.get(name, ((), ""))[1] == "float32"
        }
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
    return manager.restore(step, args=ocp.args.Composite(state=args)).state


def _restore_cursor(manager: ocp.CheckpointManager, checkpoint: Path, like: Any) -> Any:
    """The state of this process's cursor, as bytes or as JSON, whichever `like` is."""
    here = jax.process_count()
    counts = (
        {int(file.stem.split("-of-")[1]) for file in (checkpoint / "cursor").glob("*-of-*.json")}
        if (checkpoint / "cursor").exists()
        else set()
    )
    if not counts:
        raise UserError(f"{checkpoint}: saved without a data cursor")
    if here not in counts:
        raise UserError(
            f"{checkpoint}: saved by {counts.pop()} processes, this run has {here}; the data cursor needs as many"
        )
    cursor = _Bytes()
    manager.restore(int(checkpoint.name), args=ocp.args.Composite(cursor=CheckpointRestore(cursor)))
    return cursor.state if isinstance(like, bytes) else json.loads(cursor.state)


def _to_bytes(state: Any) -> bytes:
    return state if isinstance(state, bytes) else json.dumps(state).encode()


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a state, or Orbax's records of them, by their paths: `params/embedding`,
    whether of dictionaries or structs.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def entries(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> shape and dtype, for arrays and for Orbax's records of them alike."""
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in by_path(tree).items()}


def difference_between(there: dict, here: dict) -> str | None:
    """The first of the `entries` that differs, and how many more do; parameters before the
    optimizer's copies of them.
    """
    clauses = {}
    for name in here | there:
        if name not in there:
            clauses[name] = f"{name} is not there, {_shape(here[name])} in this config"
        elif name not in here:
            clauses[name] = f"{name} is {_shape(there[name])} there, not in this config"
        elif here[name][0] != there[name][0]:
            clauses[name] = (
                f"{name} is {_shape(there[name])} there, {_shape(here[name])} in this config"
            )
        elif here[name][1] != there[name][1]:
            clauses[name] = f"{name} is {there[name][1]} there, {here[name][1]} in this config"
    if not clauses:
        return None
    more = f" (and {len(clauses) - 1} more)" if len(clauses) > 1 else ""
    return clauses[min(clauses, key=lambda name: not name.startswith("params/"))] + more


def _shape(entry: tuple[tuple[int, ...], str]) -> str:
    return f"[{','.join(map(str, entry[0]))}]"


def reason_of(failure: Exception) -> str | None:
    """What the operating system said, of an error of Python's or of tensorstore's (which are
    ValueErrors); None for any other error.
    """
    if isinstance(failure, OSError):
        return failure.strerror or str(failure)
    code = re.search(r"os_error_code='(\d+)'", str(failure))
    return os.strerror(int(code.group(1))) if code else None
