"""A checkpoint written and read a slice at a time.

The process could not have the checkpoint in memory, nor even one of its arrays.
`checkpoints/training.py` hands Orbax whole arrays. Here Orbax writes a checkpoint of the same tree
with a scalar for every array: a skeleton, with all that Orbax knows of a checkpoint (the tree, the
kind of each leaf, its own bookkeeping). Then tensorstore, the library beneath Orbax, makes each
array anew at its full size, in its place, and fills it chunk by chunk. Shape, dtype, chunks and
compression are known from the array itself, so Orbax restores the result like any other checkpoint,
and we need none of its private names. The skeleton is without OCDBT, Orbax's container of many
chunks to a file: with a file to each, a chunk is written, lost and written again by itself.

A checkpoint that is being written is the directory `<step>.unfinished`, which neither Orbax nor we
take for a checkpoint:

    journal      JSON lines: what is being written and from where, then one line for each block
                 that is on the disk ("piece": its name, "elements": how many of each leaf)
    checkpoint/  what becomes `<step>` by one rename, at the end
"""

import functools
import json
import operator
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from checkpoints.checksums import write_checksums
from checkpoints.chunking import CHUNK_BYTES, chunk_shape
from checkpoints.disk_errors import disk_errors, reason_of
from checkpoints.restore import array_records, open_checkpoint
from checkpoints.trees import by_path, difference_between, specs
from errors import UserError
from files import write_text

# The most bytes on their way to the disk while the next values are made. Each value is in memory
# three times: as given, as a chunk, and compressed.
MAX_PENDING_BYTES = CHUNK_BYTES
# Without these limits tensorstore keeps chunks in memory for another reading, and works on dozens
# at once.
CONTEXT = {
    "cache_pool": {"total_bytes_limit": 0},
    "file_io_concurrency": {"limit": 2},
    "data_copy_concurrency": {"limit": 2},
}
# Shuffled, bytes of equal significance lie next to each other, and the low halves of float32s that
# come from bfloat16 vanish: the result is smaller than by zstd, at three times the speed.
COMPRESSOR = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}


class StreamedWriter:
    """Writes the checkpoint `directory/<step>` block by block.

    A block is whatever the caller writes between two calls of `mark`. Made again after an
    interruption, the writer goes on with the blocks that are not on the disk:

        writer = StreamedWriter(directory, 0, abstract_state, source="hf/model, bfloat16")
        for layer, expert in matrices:
            block = f"{layer} {expert}"
            if block not in writer.done:
                writer.write("params/layers_1/block_0/moe/up", (layer, expert), values)
                writer.mark(block)
        writer.finish()

    Args:
      directory: the directory of checkpoints, created if need be.
      step: the step of the checkpoint.
      abstract_state: pytree of `jax.ShapeDtypeStruct`s. A leaf goes by its path, as
        `params/embedding`.
      source: what the values are made from, and how: what two writers must agree on for one to go
        on with the other's work.
      chunks: leaf -> the shape of its chunks. Each is a file; best is what one `write` brings. By
        default a chunk is a matrix, or 64 MiB of rows of one.

    Attributes:
      done: the names of the blocks that are on the disk.

    Raises:
      UserError: the step is there already, or begun from another source or for another state; or
        the disk fails, here and in every method.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        abstract_state: Any,
        source: str,
        chunks: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self._final = directory.absolute() / str(step)
        self._unfinished = directory.absolute() / f"{step}.unfinished"
        self._journal = self._unfinished / "journal"
        self._checkpoint = self._unfinished / "checkpoint"
        self._leaves = by_path(abstract_state)
        self._context = tensorstore.Context(CONTEXT)
        # Writes that are pending, the oldest first: their bytes, and what waits for them. Marks
        # stand between them, with no bytes.
        self._queue: deque[tuple[int, Callable[[], Any]]] = deque()
        self._pending_bytes = 0
        # Elements of each leaf: those written since the last mark, and those in the journal.
        self._unmarked: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self._files: dict[str, str] = {}  # where each leaf's array is, within checkpoint/
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        self.done: set[str] = set()
        if self._final.exists():
            raise UserError(
                f"{self._final}: there already; delete it, or write to another directory"
            )
        with disk_errors(self._disk_error):
            if not (self._journal.exists() and self._checkpoint.exists()):
                self._create(abstract_state, source, chunks or {})
            self._resume(source)

    def write(self, name: str, index: tuple[int | slice, ...], value: np.ndarray) -> None:
        """Starts to write leaf[index] = value, and waits only while much is pending.

        The value is not copied: the caller leaves it as it is.

        Args:
          name: the leaf's path.
          index: ints and slices without a step, meaning what they mean to numpy; () for the whole
            leaf.
          value: of the leaf's dtype and of exactly the shape of leaf[index].

        Raises:
          ValueError: the value is of another dtype or shape.
        """
        target = self._array(name)[_within(self._leaves[name].shape, index)]
        if value.shape != target.shape or value.dtype != self._leaves[name].dtype:
            raise ValueError(
                f"{name}{list(index)} is {self._leaves[name].dtype} {target.shape},"
                f" the value {value.dtype} {value.shape}"
            )
        self._wait_until_pending(MAX_PENDING_BYTES - value.nbytes)
        write = target.write(value, can_reference_source_data_indefinitely=True)
        self._queue.append((value.nbytes, write.result))
        self._pending_bytes += value.nbytes
        self._unmarked[name] += value.size

    def mark(self, block: str) -> None:
        """Names what was written since the last mark.

        The name is in `done` once all of that is on the disk.
        """
        self._queue.append((0, functools.partial(self._record, block, dict(self._unmarked))))
        self._unmarked.clear()
        self._wait_until_pending(MAX_PENDING_BYTES)

    def finish(self) -> None:
        """Waits for the last blocks and gives the checkpoint its name.

        Raises:
          ValueError: the blocks are not the whole state, each element once.
        """
        self._wait_until_pending(0)
        for name, leaf in self._leaves.items():
            if self._elements[name] != leaf.size:
                raise ValueError(
                    f"{name}: {self._elements[name]} of {leaf.size} elements written and marked"
                )
        with disk_errors(self._disk_error):
            write_checksums(self._checkpoint)
            os.rename(self._checkpoint, self._final)
            shutil.rmtree(self._unfinished)

    def _create(
        self, abstract_state: Any, source: str, chunks: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Makes the skeleton, its arrays at full size and still empty, and last the journal.

        Without a journal there is nothing to go on with.
        """
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._files = self._create_skeleton(abstract_state)
        for name, leaf in self._leaves.items():
            chunk = list(chunks.get(name) or chunk_shape(leaf))
            tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": self._kvstore(name),
                    "metadata": {"chunks": chunk, "compressor": COMPRESSOR},
                },
                create=True,
                delete_existing=True,
                dtype=tensorstore.dtype(leaf.dtype),
                shape=leaf.shape,
                context=self._context,
            ).result()
        header = {"source": source, "leaves": specs(abstract_state), "arrays": self._files}
        write_text(self._journal, json.dumps(header) + "\n")

    def _create_skeleton(self, abstract_state: Any) -> dict[str, str]:
        """Makes a checkpoint with a scalar for every array, and returns where each array is."""
        skeleton = self._unfinished / "skeleton"
        skeleton.mkdir(parents=True)
        with ocp.CheckpointManager(
            skeleton,
            item_handlers={"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False)},
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        ) as manager:
            scalars = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), abstract_state)
            manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(scalars)))
            records = by_path(array_records(manager, 0))
        os.rename(skeleton / "0", self._checkpoint)
        skeleton.rmdir()
        return {name: f"{record.directory.name}/{record.name}" for name, record in records.items()}

    def _resume(self, source: str) -> None:
        """Reads the journal.

        Its last line may have been cut off; that block is written again.
        """
        text = self._journal.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        os.truncate(self._journal, len(complete))
        header, *blocks = map(json.loads, complete.splitlines())
        there = {name: (tuple(shape), dtype) for name, (shape, dtype) in header["leaves"].items()}
        if header["source"] != source:
            raise UserError(
                f"{self._unfinished}: begun from {header['source']}, not from {source};"
                " delete it to begin anew"
            )
        if difference := difference_between(there, specs(self._leaves)):
            raise UserError(
                f"{self._unfinished}: begun for another state: {difference};"
                " delete it to begin anew"
            )
        # This is the name of a chunk until it is whole. Tensorstore would write over one that is
        # left, and keep the end of it where it is longer.
        for half_written in self._checkpoint.rglob("*.__lock"):
            half_written.unlink()
        self._files = header["arrays"]
        for block in blocks:
            self.done.add(block["piece"])
            self._elements.update(block["elements"])

    def _record(self, block: str, elements: dict[str, int]) -> None:
        """Writes the line of a block into the journal."""
        # Tensorstore has synced the data. The line itself need not be: if it is lost with the
        # machine, the block is written again.
        with open(self._journal, "a") as journal:
            journal.write(json.dumps({"piece": block, "elements": elements}) + "\n")
        self.done.add(block)
        self._elements.update(elements)

    def _wait_until_pending(self, limit: int) -> None:
        """Waits until no more than `limit` bytes are pending.

        The blocks that this completes go into the journal.
        """
        with disk_errors(self._disk_error):
            while self._queue and (self._pending_bytes > limit or self._queue[0][0] == 0):
                size, wait = self._queue[0]
                wait()
                self._queue.popleft()  # not before: after a failure no later block gets past it
                self._pending_bytes -= size

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._arrays:
            spec = {"driver": "zarr", "kvstore": self._kvstore(name)}
            self._arrays[name] = tensorstore.open(spec, context=self._context).result()
        return self._arrays[name]

    def _kvstore(self, name: str) -> dict[str, str]:
        return {"driver": "file", "path": f"{self._checkpoint / self._files[name]}/"}

    def _disk_error(self, reason: str) -> str:
        return (
            f"{self._unfinished}: cannot write there: {reason};"
            " the same command again goes on from here"
        )


class StreamedReader:
    """Reads slices of the arrays of a checkpoint, whoever wrote it.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Attributes:
      checkpoint: the one it reads, the newest there is.
      leaves: by path, as `params/embedding`, their shapes and dtypes.

    Raises:
      UserError: no checkpoint there.
    """

    def __init__(self, path: Path):
        with open_checkpoint(path) as (manager, directory, step):
            records = by_path(array_records(manager, step))
        self.checkpoint = directory / str(step)
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        self._specs = {}
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        self._context = tensorstore.Context(CONTEXT)
        for name, record in records.items():
            self.leaves[name] = jax.ShapeDtypeStruct(tuple(record.shape), record.dtype)
            store = {"driver": "file", "path": f"{record.directory / record.name}/"}
            if (record.directory / "manifest.ocdbt").exists():
                store = {
                    "driver": "ocdbt",
                    "base": {"driver": "file", "path": f"{record.directory}/"},
                    "path": f"{record.name}/",
                }
            self._specs[name] = {"driver": "auto", "kvstore": store}

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns leaf[index]. Reads the chunks that it touches, each of them whole.

        Args:
          name: the leaf's path.
          index: ints and slices without a step, meaning what they mean to numpy; () for the whole
            leaf.

        Raises:
          UserError: a chunk cannot be read.
        """
        index = _within(self.leaves[name].shape, index)
        try:
            return self._array(name)[index].read().result()
        except (OSError, ValueError) as failure:
            reason = reason_of(failure) or "damaged, or a part of it is missing"
            raise UserError(f"{self.checkpoint}: {name} cannot be read: {reason}") from failure

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a leaf's chunks, in multiples of which it is read."""
        shape = self._array(name).chunk_layout.read_chunk.shape or ()
        return cast(tuple[int, ...], tuple(shape))

    def _array(self, name: str) -> tensorstore.TensorStore:
        """Opens an array for reading, once."""
        if name not in self._arrays:
            found = (
                tensorstore.open(self._specs[name], read=True, context=self._context)
                .result()
                .spec()
                .to_json()
            )
            # A chunk that is not there would be read as zeros; Orbax and we store every chunk.
            found["fill_missing_data_reads"] = False
            self._arrays[name] = tensorstore.open(found, read=True, context=self._context).result()
        return self._arrays[name]


def _within(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int | slice, ...]:
    """Returns the index without negative numbers and without what is beyond the shape.

    Tensorstore wants it so: to it an array has no end.
    """
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices into shape {shape}")
    inside = []
    for size, at in zip(shape, index, strict=False):
        if isinstance(at, slice):
            start, stop, step = at.indices(size)
            if step != 1:
                raise IndexError(f"a slice with a step, {at}")
            inside.append(slice(start, max(start, stop)))
        else:
            inside.append(range(size)[operator.index(at)])
    return tuple(inside)
