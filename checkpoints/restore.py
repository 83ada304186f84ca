"""Reads Orbax's checkpoints: the newest whole one, onto any mesh, all of it or parts.

What does not fit, and what cannot be read, is one line.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointHandler
from jax.sharding import SingleDeviceSharding

from checkpoints.checksums import has_checksums
from checkpoints.disk_errors import reason_of
from checkpoints.trees import Spec, difference_between, specs
from checkpoints.whole import damage_of, is_step, newest_whole, steps_in
from errors import UserError

# Orbax logs each failure of its threads with a traceback, besides raising it. One error is reported
# once, by us.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
warnings.filterwarnings("ignore", module="orbax")
# After a failure it closes its event loop while other writes and reads are under way, which asyncio
# logs and Python notes, each with a traceback.
logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
)


def _ignore_closed_loop(unraisable: Any, before: Callable[[Any], Any] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)


sys.unraisablehook = _ignore_closed_loop

# Replicas share the writing of an array if each gets this much of it. Orbax shares out every array,
# and compiles each slice of each while training waits.
SLICE_BYTES = 16 * 2**20
# What the name of a checkpoint that is being written contains.
TMP_MARK = ".orbax-checkpoint-tmp"


def restore_parameters(path: Path, abstract: Any) -> Any:
    """Reads the parts of a run's newest whole checkpoint that a forward pass needs.

    The optimizer's state is not read. The run may train meanwhile: where it deletes the checkpoint
    that is being read, the next one is.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      abstract: dict or struct, the parts of the state to read (its fields `params` and `router`),
        as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      A pytree like abstract.

    Raises:
      UserError: no checkpoint there, or one that does not fit.
    """
    while True:
        with open_checkpoint(path) as (manager, directory, step):
            try:
                return restore_state(manager, directory, step, abstract, partial=True)
            except Exception:
                # All processes see what process 0 sees; without a checkpoint there is no next one.
                if step in steps_in(directory) or directory / str(step) == path:
                    raise


@contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[ocp.CheckpointManager, Path, int]]:
    """Yields Orbax's manager, the directory of checkpoints and the step that `path` means.

    That is the newest whole checkpoint, or the one that `path` names.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Raises:
      UserError: no checkpoint there, or none that is whole.
    """
    directory, step = path, None
    if is_step(directory.name) and (directory / "state").exists():
        directory, step = directory.parent, int(directory.name)
    elif (directory / "checkpoints").exists():
        directory = directory / "checkpoints"
    if step is not None:
        check_whole(path)
    elif (step := newest_whole(directory)) is None:
        raise UserError(f"{path}: no checkpoint there")
    manager = open_manager(directory, create=False, read_only=True)
    try:
        yield manager, directory, step
    finally:
        manager.close()


def check_whole(checkpoint: Path) -> None:
    """Raises UserError if a checkpoint is damaged."""
    if what := damage_of(checkpoint):
        raise UserError(f"{checkpoint}: damaged ({what}); use another checkpoint")


def open_manager(
    directory: Path, on_failure: Callable[[Exception], None] | None = None, **options: Any
) -> ocp.CheckpointManager:
    """Opens the checkpoints of a directory, with handlers for the state and the data's cursor.

    Args:
      directory: where they are.
      on_failure: called, in a thread of Orbax, when this process cannot write its part of a state.
      options: of Orbax's manager.
    """
    types = ocp.type_handlers.create_type_handler_registry(
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES),
        ),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (np.number, ocp.type_handlers.ScalarHandler()),
    )
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    if on_failure is not None:
        start = state.async_save

        async def async_save(*args: Any, **kwargs: Any) -> list[Any]:
            return [_Watched(save, on_failure) for save in await start(*args, **kwargs) or []]

        state.async_save = async_save
    handlers = {"state": state, "cursor": CheckpointHandler()}
    return ocp.CheckpointManager(
        directory.resolve(), item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


class _Watched:
    """A future of Orbax that tells at once why it fails.

    Orbax itself tells it when all processes have come to its next barrier.
    """

    def __init__(self, save: Any, on_failure: Callable[[Exception], None]):
        self._save, self._on_failure = save, on_failure

    def result(self, timeout: float | None = None) -> Any:
        """Waits for what is written."""
        try:
            return self._save.result(timeout=timeout)
        except Exception as failure:
            self._on_failure(failure)
            raise

    def cancel(self) -> Any:
        """Gives the writing up."""
        return self._save.cancel()


def restore_state(
    manager: ocp.CheckpointManager, directory: Path, step: int, abstract: Any, partial: bool = False
) -> Any:
    """Returns the state of a checkpoint; `partial`: the parts of it that `abstract` has.

    Raises UserError if the checkpoint does not fit, or is damaged and has no checksums.
    """
    checkpoint, here = directory / str(step), specs(abstract)
    with damage_as_one_line(checkpoint):
        there = specs(array_records(manager, step))
    if partial:
        there = _parts_of(there, here)
    if difference := difference_between(there, here):
        raise UserError(f"{checkpoint}: {difference}")

    default = SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        ),
        abstract,
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    args = ocp.args.PyTreeRestore(item=placed, restore_args=restore_args, partial_restore=partial)
    with damage_as_one_line(checkpoint):
        restored: Any = manager.restore(step, args=ocp.args.Composite(state=args))
    return restored.state


@contextmanager
def damage_as_one_line(checkpoint: Path) -> Iterator[None]:
    """Makes one line of whatever a library says of a damaged checkpoint without checksums.

    Where checksums were compared the bytes are right, and the failure is of another kind: then, and
    where a device fails, it passes.
    """
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as failure:
        if reason := reason_of(failure):
            raise UserError(f"{checkpoint}: cannot be read: {reason}") from failure
        if has_checksums(checkpoint):
            raise
        raise UserError(
            f"{checkpoint}: cannot be read: damaged, or a part of it is missing; move it out of "
            f"{checkpoint.parent} to use the one before"
        ) from failure


def array_records(manager: ocp.CheckpointManager, step: int) -> Any:
    """Returns the tree of Orbax's records of the arrays of a checkpoint."""
    metadata: Any = manager.item_metadata(step)
    return metadata.state.tree


def _parts_of(there: dict[str, Spec], here: dict[str, Spec]) -> dict[str, Spec]:
    """Returns what a checkpoint has of the parts of the state that are read.

    Parameters alone may be stored in bfloat16 (launch.convert --dtype=bfloat16); Orbax makes
    float32 of them.
    """

    def part(name: str) -> str:
        """Returns "params", "router" and so on, of a critic "critic/params"."""
        first, second, *_ = f"{name}/".split("/")
        return f"{first}/{second}" if first == "critic" else first

    parts = {part(name) for name in here}
    there = {name: spec for name, spec in there.items() if part(name) in parts}
    return there | {
        name: (shape, "float32")
        for name, (shape, dtype) in there.items()
        if dtype == "bfloat16" and here.get(name, ((), ""))[1] == "float32"
    }
