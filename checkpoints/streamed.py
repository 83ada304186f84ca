"""A checkpoint written and read piece by piece, by a process that could not hold it, nor even one
of its arrays.

`train.checkpoint` hands Orbax whole arrays. Here Orbax writes a checkpoint of the same tree with a
scalar for every array: its frame, with all that Orbax knows of a checkpoint (the tree, the kind of
each leaf, its own bookkeeping). Then tensorstore, the library beneath Orbax, makes each array anew
at its full size, in its place, and fills it chunk by chunk. Shape, dtype, chunks and compression
are known from the array itself, so Orbax restores the result like any other checkpoint, and we need
none of its private names. The frame is without OCDBT, Orbax's container of many chunks to a file:
with a file to each, a chunk is written, lost and written again by itself.

A checkpoint under way is the directory `<step>.unfinished`, which neither Orbax nor we take for a
checkpoint:

    journal      JSON lines: what is being written and from where, then one line for each piece that
      is on the disk checkpoint/  what becomes `<step>` by one rename, at the end
"""

import functools
import json
import math
import operator
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from checkpoints.training import (
    CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    by_path,
    difference_between,
    entries,
    opened,
    reason_of,
)
from errors import UserError

# Of values on their way to the disk while the next are made. Each is in memory three times: as
# given, as a chunk, and compressed.
UNDER_WAY_BYTES = CHUNK_BYTES
# Else tensorstore keeps chunks in memory for another reading, and has dozens in hand at once.
CONTEXT = {
    "cache_pool": {"total_bytes_limit": 0},
    "file_io_concurrency": {"limit": 2},
    "data_copy_concurrency": {"limit": 2},
}
# Shuffled, bytes of equal significance lie together, and the low halves of float32s that were
# bfloat16 vanish: smaller than by zstd, at thrice the speed.
COMPRESSOR = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}


class StreamedWriter:
    """Writes the checkpoint `directory/<step>` piece by piece; made again after an interruption, it
    goes on where it stopped.

        writer = PieceWriter(directory, 0, abstract_state, source="hf/model, bfloat16")
        for piece in pieces:
            if piece.name not in writer.done:
                writer.write("params/moe_layers/moe/up", (layer, expert), value)
                writer.mark(piece.name)
        writer.finish()

    Args:
      directory: of checkpoints, created if need be.
      step: the checkpoint's.
      abstract_state: pytree of `jax.ShapeDtypeStruct`s. A leaf goes by its path, as
        `params/embedding`.
      source: what the values are made from, and how: what two runs must agree on for one to go on
        with the other's work.
      chunks: leaf -> the shape of its chunks. Each is a file; best is what one `write` brings. By
        default a matrix, or 64 MiB of rows of one.

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
        self._journal, self._checkpoint = (
            self._unfinished / "journal",
            self._unfinished / "checkpoint",
        )
        self._leaves = by_path(abstract_state)
        self._context = tensorstore.Context(CONTEXT)
        self._queue: deque[tuple[int, Callable[[], Any]]] = (
            deque()
        )  # oldest first: bytes under way, and what waits for them
        self._under_way = 0
        self._unmarked: Counter[str] = (
            Counter()
        )  # elements of each leaf, written since the last mark
        self._elements: Counter[str] = Counter()  # elements of each leaf that the journal tells of
        self._files: dict[str, str] = {}  # where each leaf's array is, within checkpoint/
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        self.done: set[str] = set()
        if self._final.exists():
            raise UserError(
                f"{self._final}: there already; delete it, or write to another directory"
            )
        with self._failures_named():
            if not (self._journal.exists() and self._checkpoint.exists()):
                self._begin(abstract_state, source, chunks or {})
            self._go_on(source)

    def write(self, name: str, index: tuple[int | slice, ...], value: np.ndarray) -> None:
        """Starts to write leaf[index] = value; waits only while much is under way already. The
        value is not copied: leave it as it is.

        Args:
          name: the leaf's path.
          index: ints and slices without a step, meaning what they mean to numpy; () for the whole
            leaf.
          value: of the leaf's dtype and of exactly the shape of leaf[index].
        """
        target = self._array(name)[_within(self._leaves[name].shape, index)]
        if value.shape != target.shape or value.dtype != self._leaves[name].dtype:
            raise ValueError(
                f"{name}{list(index)} is {self._leaves[name].dtype} {target.shape}, the value {value.dtype} {value.shape}"
            )
        self._advance(UNDER_WAY_BYTES - value.nbytes)
        self._queue.append(
            (value.nbytes, target.write(value, can_reference_source_data_indefinitely=True).result)
        )
        self._under_way += value.nbytes
        self._unmarked[name] += value.size

    def mark(self, piece: str) -> None:
        """What was written since the last mark is this piece. It will be in `done` once all of it
        is on the disk.
        """
        self._queue.append((0, functools.partial(self._record, piece, dict(self._unmarked))))
        self._unmarked.clear()
        self._advance(UNDER_WAY_BYTES)

    def finish(self) -> None:
        """Waits for the last pieces and gives the checkpoint its name. Raises ValueError if the
        pieces are not the whole state, each element once.
        """
        self._advance(0)
        for name, leaf in self._leaves.items():
            if self._elements[name] != leaf.size:
                raise ValueError(
                    f"{name}: {self._elements[name]} of {leaf.size} elements written and marked"
                )
        with self._failures_named():
            os.rename(self._checkpoint, self._final)
            shutil.rmtree(self._unfinished)

    def _begin(
        self, abstract_state: Any, source: str, chunks: Mapping[str, tuple[int, ...]]
    ) -> None:
        """The frame, its arrays at full size and still empty, and last the journal: without it
        there is nothing to go on with.
        """
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        frame = self._unfinished / "frame"
        frame.mkdir(parents=True)
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False)}
        with ocp.CheckpointManager(
            frame,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        ) as manager:
            scalars = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), abstract_state)
            manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(scalars)))
            records = by_path(manager.item_metadata(0).state.tree)
        os.rename(frame / "0", self._checkpoint)
        frame.rmdir()

        arrays = {
            name: f"{record.directory.name}/{record.name}" for name, record in records.items()
        }
        for name, leaf in self._leaves.items():
            metadata = {"chunks": list(chunks.get(name) or _chunk(leaf)), "compressor": COMPRESSOR}
            spec = {"driver": "zarr", "kvstore": self._kvstore(arrays[name]), "metadata": metadata}
            tensorstore.open(
                spec,
                create=True,
                delete_existing=True,
                dtype=tensorstore.dtype(leaf.dtype),
                shape=leaf.shape,
                context=self._context,
            ).result()

        begun = self._journal.with_suffix(".tmp")
        begun.write_text(
            json.dumps({"source": source, "leaves": entries(abstract_state), "arrays": arrays})
            + "\n"
        )
        os.rename(begun, self._journal)

    def _go_on(self, source: str) -> None:
        """Reads the journal. Its last line may have been cut off; that piece is written again."""
        text = self._journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.truncate(self._journal, len(whole))
        header, *pieces = map(json.loads, whole.splitlines())
        there = {name: (tuple(shape), dtype) for name, (shape, dtype) in header["leaves"].items()}
        if header["source"] != source:
            raise UserError(
                f"{self._unfinished}: begun from {header['source']}, not from {source}; delete it to begin anew"
            )
        if difference := difference_between(there, entries(self._leaves)):
            raise UserError(
                f"{self._unfinished}: begun for another state: {difference}; delete it to begin anew"
            )
        # What a chunk is called until it is whole. Tensorstore would write over one that was left,
        # and keep the end of it where it was longer.
        for half_written in self._checkpoint.rglob("*.__lock"):
            half_written.unlink()
        self._files = header["arrays"]
        for piece in pieces:
            self.done.add(piece["piece"])
            self._elements.update(piece["elements"])

    def _record(self, piece: str, elements: dict[str, int]) -> None:
        # Tensorstore has synced the data. The line itself need not be: lost with the machine, it
        # costs writing the piece again.
        with open(self._journal, "a") as journal:
            journal.write(json.dumps({"piece": piece, "elements": elements}) + "\n")
        self.done.add(piece)
        self._elements.update(elements)

    def _advance(self, limit: int) -> None:
        """Waits until no more than `limit` bytes are under way, and journals the pieces that this
        completes.
        """
        with self._failures_named():
            while self._queue and (self._under_way > limit or self._queue[0][0] == 0):
                size, wait = self._queue[0]
                wait()
                self._queue.popleft()  # not before: after a failure no later piece gets past it
                self._under_way -= size

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._arrays:
            spec = {"driver": "zarr", "kvstore": self._kvstore(self._files[name])}
            self._arrays[name] = tensorstore.open(spec, context=self._context).result()
        return self._arrays[name]

    def _kvstore(self, file: str) -> dict[str, str]:
        return {"driver": "file", "path": f"{self._checkpoint / file}/"}

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """A failure of the disk becomes one line."""
        try:
            yield
        except (OSError, ValueError) as failure:
            reason = reason_of(failure)
            if reason is None:
                raise
            raise UserError(
                f"{self._unfinished}: cannot write there: {reason}; the same command again goes on from here"
            ) from failure


class StreamedReader:
    """Reads slices of the arrays of a checkpoint, whether `Checkpoints` or a `PieceWriter` wrote
    it.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Attributes:
      checkpoint: the one it reads, the newest there is.
      leaves: by path, as `params/embedding`, their shapes and dtypes.

    Raises:
      UserError: no checkpoint there.
    """

    def __init__(self, path: Path):
        with opened(path) as (manager, directory, step):
            records = by_path(manager.item_metadata(step).state.tree)
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
        """leaf[index] of the leaf of that path. Reads the chunks it touches, each of them whole.

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
            raise UserError(
                f"{self.checkpoint}: {name} cannot be read: {reason_of(failure) or 'damaged, or a part of it is missing'}"
            ) from failure

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape of a leaf's chunks: what a read touches of it is read in multiples of these."""
        return tuple(self._array(name).chunk_layout.read_chunk.shape or ())

    def _array(self, name: str) -> tensorstore.TensorStore:
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


def _chunk(leaf: jax.ShapeDtypeStruct) -> list[int]:
    """One matrix of a stack, if it is large; and of that, rows in as equal parts as do not exceed a
    chunk.
    """
    chunk = [max(1, size) for size in leaf.shape]
    for axis, size in enumerate(chunk):
        entry = math.prod(chunk[axis + 1 :]) * leaf.dtype.itemsize
        stack = len(chunk) - axis > 2 and entry >= LEAST_CHUNK_BYTES
        parts = size if stack else math.ceil(size / max(1, CHUNK_BYTES // entry))
        chunk[axis] = math.ceil(size / parts)
        if chunk[axis] > 1:
            break
    return chunk


def _within(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int | slice, ...]:
    """The index with no negative numbers and nothing beyond the shape, as tensorstore wants it: to
    it an array has no end.
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
