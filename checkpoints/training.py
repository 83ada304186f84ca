"""Checkpoints of training runs: written in the background, restored onto any mesh.

A checkpoint has the state and the data cursor, saved at the same step. This is Orbax, with the
errors of disks and of checkpoints that do not fit in one line each.
"""

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointSave
from orbax.checkpoint.checkpoint_manager import StepAlreadyExistsError

from checkpoints.checksums import write_checksums
from checkpoints.chunking import save_args
from checkpoints.cursors import Cursor, SavedCursor, restore_cursor, to_bytes
from checkpoints.disk_errors import disk_errors, reason_of
from checkpoints.restore import TMP_MARK, check_whole, open_manager, restore_state
from checkpoints.whole import set_damaged_aside
from errors import UserError


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
        self._saving: int | None = None  # the step of the save that was started last
        self._failure: Exception | None = None  # of the save that is running
        set_damaged_aside(directory)
        try:
            self._manager = open_manager(
                self.directory,
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
                on_failure=self._note_failure,
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
            items["cursor"] = CheckpointSave(SavedCursor(to_bytes(cursor.get_state())))
        self.wait()
        with self._disk_errors(self._clean_up):
            self._saving = step
            self.directory.stat()  # a directory that was deleted meanwhile is not made again
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
        if step != self.latest():  # which was whole when this was made
            check_whole(self.directory / str(step))
        state = restore_state(self._manager, self.directory, step, abstract_state)
        if cursor is not None:
            restore_cursor(self._manager, self.directory / str(step), cursor)
        self._current = step
        return state

    def latest(self) -> int | None:
        """Returns the newest step that is whole on the disk, or None when there is none."""
        self.wait()
        return self._manager.latest_step()

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        self.wait()
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def check(self) -> None:
        """Raises UserError if the save that is running has failed. It never waits.

        With several processes one of them may have a full disk. The others do not hear of it, and
        Orbax waits for them; so whoever hears of it ends the run.
        """
        if self._failure is not None and jax.process_count() > 1:
            with self._disk_errors(self._described):
                raise self._failure
        if self._failure is not None:
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is running. Raises UserError if it failed."""
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.02)
        with self._disk_errors(self._clean_up):
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
        if self._failure is not None and jax.process_count() > 1:
            return  # the others will not come to where Orbax waits for them
        try:
            self.close()
        except UserError:
            if kind is None:  # else the error that ended the run is the one to see
                raise

    def _write_checksums(self) -> None:
        """Adds the checksums to the checkpoint whose files are all written, before it has its name.

        Orbax calls it in its thread, on process 0.
        """
        unnamed = next(self.directory.glob(f"{self._saving}{TMP_MARK}*"), None)
        if unnamed is None:
            raise _is_gone(self.directory / str(self._saving))
        write_checksums(unnamed)

    def _note_failure(self, failure: Exception) -> None:
        """Remembers why a save fails; a thread of Orbax calls it, as soon as this process knows."""
        self._failure = failure

    @contextlib.contextmanager
    def _disk_errors(self, describe: Callable[[str], str]) -> Iterator[None]:
        """Turns a failure of the disk into a UserError, as `disk_errors` does.

        Where somebody has deleted what is being written, libraries fail in words of any kind.
        """
        with disk_errors(describe):
            try:
                yield
            except Exception as failure:
                gone = self._deleted()
                if gone is None or reason_of(failure):
                    raise
                raise _is_gone(gone) from failure

    def _deleted(self) -> Path | None:
        """Returns a checkpoint that is no longer on the disk, or the one that was being written."""
        known = [self.directory / str(step) for step in self._manager.all_steps()]
        if next(self.directory.glob(f"{self._saving}*"), None) is None:
            known.append(self.directory / str(self._saving))
        return next((place for place in known if not place.exists()), None)

    def _clean_up(self, reason: str) -> str:
        """Removes what is half written, which may be what filled the disk.

        Returns the line of error for a failure of the disk.
        """
        self._failure = None
        self._current = self._manager.latest_step()
        if jax.process_index() == 0 and self.directory.exists():
            for half_written in self.directory.glob(f"*{TMP_MARK}*"):
                shutil.rmtree(half_written, ignore_errors=True)
        return self._described(reason)

    def _described(self, reason: str) -> str:
        there = [
            step for step in self._manager.all_steps() if (self.directory / str(step)).exists()
        ]
        if there:
            rest = f"the newest good checkpoint is step {max(there)}"
        else:
            rest = "no checkpoint is there"
        return f"{self.directory}: cannot write a checkpoint: {reason} ({rest})"


def _is_gone(place: Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "its files were deleted meanwhile", str(place))
