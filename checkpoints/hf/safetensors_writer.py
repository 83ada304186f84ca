"""Safetensors files, written a few rows of a tensor at a time.

Shards and their index are laid out as Hugging Face's libraries read them. The safetensors package
cannot write a tensor in parts. `safetensors.py` says what is in a file.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.hf.safetensors import DTYPE_NAMES, INDEX, SINGLE, TensorInfo, as_bytes
from errors import UserError
from files import publish, write_json

SHARD_BYTES = 5_000_000_000  # the size of Hugging Face's own shards


class _Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Shard(NamedTuple):
    """A file that is to be written; `size` is in bytes, its header included."""

    file: Path
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int

    @property
    def temporary(self) -> Path:
        """The name of the file while it is not whole."""
        return self.file.with_name(self.file.name + ".tmp")

    def is_whole(self) -> bool:
        """Returns whether this file, and not another of its name, is on the disk."""
        with open(self.file, "rb") as file:
            return (
                file.read(len(self.header)) == self.header and self.file.stat().st_size == self.size
            )


class TensorWriter:
    """Writes tensors, in the order planned, into shards and their index.

    A shard appears under its name when it is whole and on the disk, the index after the last of
    them. Started again after an interruption, `done` has the names of the tensors in shards that
    are there already; they are not to be written again.

    Args:
      directory: where the files go, created if need be.
      plan: (name, dtype, shape) of every tensor.
      source: where the values come from. Each file notes its hash (a path is nobody else's
        business), so that shards of one source are not taken for another's.
      shard_bytes: bytes of tensors in one file; a larger tensor has a file of its own.
      single: the name of the file where there is one.

    Raises:
      UserError: the directory or the index cannot be written, or the directory has safetensors
        files that are not of this plan and source.
      OSError: the disk fails, in every method.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[tuple[str, Any, tuple[int, ...]]],
        source: str,
        shard_bytes: int = SHARD_BYTES,
        single: str = SINGLE,
    ):
        self.directory = directory
        planned = [_Planned(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in plan]
        self._shards = _plan_shards(directory, planned, source, shard_bytes, single)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise UserError(f"{directory}: cannot write there: {failure.strerror}") from None
        for half_written in directory.glob("*.safetensors.tmp"):
            half_written.unlink()
        there = set(directory.glob("*.safetensors"))
        whole = [shard for shard in self._shards if shard.file in there and shard.is_whole()]
        for file in there - {shard.file for shard in whole}:
            raise UserError(
                f"{file}: from another checkpoint; delete it, or write to another directory"
            )
        self.done = {name for shard in whole for name in shard.tensors}
        # The first of the missing shards is the one being written.
        self._missing = [shard for shard in self._shards if shard not in whole]
        self._begin_shard()

    def write(self, name: str, rows: np.ndarray) -> None:
        """Appends rows, along the first axis, to the tensor whose turn it is.

        A scalar is written whole.

        Raises:
          ValueError: it is another tensor's turn, or the rows do not fit.
        """
        if not self._left or name != self._left[0]:
            turn = self._left[0] if self._left else "none"
            raise ValueError(f"{name} is not the next tensor to write, which is {turn}")
        shard = self._missing[0]
        info = shard.tensors[name]
        if (
            rows.dtype != info.dtype
            or rows.shape[1:] != info.shape[1:]
            or rows.ndim != len(info.shape)
            or self._written + rows.nbytes > info.bytes
        ):
            raise ValueError(
                f"{name}: rows of {rows.dtype} {rows.shape} do not go into"
                f" {info.dtype} {info.shape}"
            )
        with open(shard.temporary, "r+b") as file:
            file.seek(info.offset + self._written)
            file.write(as_bytes(rows))
        self._written += rows.nbytes
        if self._written == info.bytes:
            self._left.pop(0)
            self._written = 0
        if not self._left:
            publish(shard.temporary, shard.file)
            self._missing.pop(0)
            self._begin_shard()

    def close(self) -> None:
        """Writes the index, if there is more than one shard.

        Raises ValueError if something is not written.
        """
        if self._missing:
            raise ValueError(f"{self._left[0]} was not written")
        if len(self._shards) == 1:
            return
        total = sum(info.bytes for shard in self._shards for info in shard.tensors.values())
        weight_map = {name: shard.file.name for shard in self._shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.directory / INDEX, index, durable=True)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._missing:
            self._missing[0].temporary.unlink(missing_ok=True)

    def _begin_shard(self) -> None:
        """Turns to the next shard that is missing."""
        self._left: list[str] = []  # the tensors still to be written into it
        self._written = 0  # bytes of the first of them that are written
        if self._missing:
            shard = self._missing[0]
            self._left = list(shard.tensors)
            shard.temporary.write_bytes(shard.header)


def _plan_shards(
    directory: Path, plan: Sequence[_Planned], source: str, shard_bytes: int, single: str
) -> list[_Shard]:
    """Returns shards with the tensors in order, as many in each as there is room for."""
    groups: list[list[_Planned]] = []
    room = 0
    for tensor in plan:
        if not groups or tensor.bytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.bytes
    if len(groups) == 1:
        return [_plan_shard(directory / single, groups[0], source)]
    return [
        _plan_shard(directory / f"model-{i:05}-of-{len(groups):05}.safetensors", group, source)
        for i, group in enumerate(groups, 1)
    ]


def _plan_shard(file: Path, tensors: Sequence[_Planned], source: str) -> _Shard:
    """Returns one shard.

    The widest types stand first in it: each tensor is then aligned to its own items, without which
    torch cannot view it.
    """
    entries, end = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        begin, end = end, end + tensor.bytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    hashed = hashlib.sha256(source.encode()).hexdigest()[:16]
    metadata = {"__metadata__": {"format": "pt", "source": hashed}}
    text = json.dumps(metadata | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = {}
    for tensor in tensors:
        begin, stop = entries[tensor.name]["data_offsets"]
        offset = len(header) + begin
        infos[tensor.name] = TensorInfo(tensor.dtype, tensor.shape, file, offset, stop - begin)
    return _Shard(file, header, infos, len(header) + end)
