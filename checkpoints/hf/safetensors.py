"""Safetensors files, read and written a few rows at a time, so that memory holds a piece of one
tensor however large the checkpoint.

    8 bytes: length of the header | header, JSON: name -> dtype, shape, data_offsets | the tensors'
      bytes, one after another, little-endian

Plain reads and writes, on purpose. Mapped pages would count as this process's memory, and the numpy
face of the safetensors package has no bfloat16 and no float8 (nor does it write a tensor in
pieces).
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; what the safetensors package allows
SHARD_BYTES = 5_000_000_000  # what Hugging Face's own shards hold


class TensorInfo(NamedTuple):
    """Where a tensor lies: `bytes` bytes from byte `offset` of `file`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


class TensorFiles:
    """The tensors of a directory: of model.safetensors, or of the files that
    model.safetensors.index.json names, or else of every *.safetensors.

    Only headers are read here, and no file is kept open: a checkpoint may have hundreds.

    Raises:
      UserError: no such directory, nothing in it, or a file that is damaged, incomplete, or at odds
        with the index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        if (directory / SINGLE).exists():
            self.tensors = _read_header(directory / SINGLE)
        elif (directory / INDEX).exists():
            self._follow_index()
        else:
            self._take_all()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of a tensor's first axis (a scalar whole), in memory of their own.

        Raises:
          UserError: the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if shape:
            stop = shape[0] if stop is None else stop
            if not 0 <= start <= stop <= shape[0]:
                raise IndexError(f"{name}: rows {start} to {stop} of {shape[0]}")
            offset += start * (info.bytes // max(1, shape[0]))
            shape = (stop - start, *shape[1:])
        rows = np.empty(shape, info.dtype)
        into = memoryview(_bytes(rows))
        with open(info.file, "rb", buffering=0) as file:
            file.seek(offset)
            while into:  # one read returns 2 GiB at most
                count = file.readinto(into)
                if not count:
                    raise UserError(f"{info.file}: ends within {name}; it is truncated")
                into = into[count:]
        return rows

    def _follow_index(self) -> None:
        index = self.directory / INDEX
        try:
            of_tensor = json.loads(index.read_bytes())["weight_map"]
            files = sorted(set(of_tensor.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError
        except OSError as failure:
            raise UserError(f"{index}: {failure.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{index}: not an index of safetensors files (a JSON object with a weight_map)"
            ) from None
        headers = {}
        for file in files:
            if not os.path.exists(self.directory / file):
                raise UserError(f"{index}: names {file[:100]}, which is not there")
            headers[file] = _read_header(self.directory / file)
        for name, file in of_tensor.items():
            if name not in headers[file]:
                raise UserError(f"{index}: says that {name} is in {file}, which lacks it")
            self.tensors[name] = headers[file][name]

    def _take_all(self) -> None:
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.directory}: no safetensors files there")
        # Shards know how many they are. Without an index, that is what tells a whole checkpoint
        # from one whose writer or download was interrupted.
        counts = Counter(
            shard["of"]
            for file in files
            if (shard := re.search(r"-\d+-of-(?P<of>\d+)\.safetensors$", file.name))
        )
        for total, count in counts.items():
            if count != int(total):
                raise UserError(
                    f"{self.directory}: {count} of {int(total)} shards, and no {INDEX}; it was not written or downloaded to its end"
                )
        for file in files:
            for name, info in _read_header(file).items():
                if name in self.tensors:
                    raise UserError(
                        f"{file}: has {name}, and so has {self.tensors[name].file.name}"
                    )
                self.tensors[name] = info


class _Shard(NamedTuple):
    file: Path
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int  # bytes, header included


class TensorWriter:
    """Writes tensors, in the order planned, into shards and their index: the layout that Hugging
    Face's libraries read.

    A shard appears under its name when it is whole and on the disk, the index after the last of
    them. Started again after an interruption, `done` has the names of the tensors in shards that
    are there already; they are not to be written again.

    Args:
      directory: where to, created if need be.
      plan: (name, dtype, shape) of every tensor.
      source: where the values come from. Each file notes its hash (a path is nobody else's
        business), so that shards of one source are not taken for another's.
      shard_bytes: of tensors, in one file; a larger tensor has a file of its own.

    Raises:
      UserError: the directory cannot be made, or has safetensors files that are not of this plan
        and source.
      OSError: the disk, in every method.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[tuple[str, Any, tuple[int, ...]]],
        source: str,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.directory = directory
        self._shards = _plan_shards(
            directory,
            [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in plan],
            source,
            shard_bytes,
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise UserError(f"{directory}: cannot write there: {failure.strerror}") from None
        for half_written in directory.glob("*.safetensors.tmp"):
            half_written.unlink()
        there = set(directory.glob("*.safetensors"))
        whole = [shard for shard in self._shards if shard.file in there and _is_whole(shard)]
        for file in there - {shard.file for shard in whole}:
            raise UserError(
                f"{file}: from another checkpoint; delete it, or write to another directory"
            )
        self.done = {name for shard in whole for name in shard.tensors}
        self._missing = [
            shard for shard in self._shards if shard not in whole
        ]  # the first is the one being written
        self._begin()

    def write(self, name: str, rows: np.ndarray) -> None:
        """Appends rows, along the first axis, to the tensor whose turn it is. A scalar is written
        whole.
        """
        if not self._left or name != self._left[0]:
            raise ValueError(
                f"{name} is not the next tensor to write, which is {self._left[0] if self._left else 'none'}"
            )
        info = self._missing[0].tensors[name]
        if (
            rows.dtype != info.dtype
            or rows.shape[1:] != info.shape[1:]
            or rows.ndim != len(info.shape)
            or self._written + rows.nbytes > info.bytes
        ):
            raise ValueError(
                f"{name}: rows of {rows.dtype} {rows.shape} do not go into {info.dtype} {info.shape}"
            )
        with open(_temporary(info.file), "r+b") as file:
            file.seek(info.offset + self._written)
            file.write(_bytes(rows))
        self._written += rows.nbytes
        if self._written == info.bytes:
            self._left.pop(0)
            self._written = 0
        if not self._left:
            _settle(self._missing.pop(0).file)
            self._begin()

    def close(self) -> None:
        """Writes the index, if there is more than one shard. Raises ValueError if something was not
        written.
        """
        if self._missing:
            raise ValueError(f"{self._left[0]} was not written")
        if len(self._shards) == 1:
            return
        total = sum(info.bytes for shard in self._shards for info in shard.tensors.values())
        weight_map = {name: shard.file.name for shard in self._shards for name in shard.tensors}
        _temporary(self.directory / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n"
        )
        _settle(self.directory / INDEX)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._missing:
            _temporary(self._missing[0].file).unlink(missing_ok=True)

    def _begin(self) -> None:
        """Turns to the next shard that is missing."""
        self._left, self._written = (
            [],
            0,
        )  # the names still to be written into it, and the bytes of the first of them that are
        if self._missing:
            shard = self._missing[0]
            self._left = list(shard.tensors)
            _temporary(shard.file).write_bytes(shard.header)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file; between them they fill it exactly, or it is refused."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= min(size, LONGEST_HEADER) else b""
    except OSError as failure:
        raise UserError(f"{file}: {failure.strerror}") from None
    if size < 8 or length > LONGEST_HEADER:
        raise UserError(f"{file}: not a safetensors file (its header would be {length} bytes long)")
    if 8 + length > size:
        raise UserError(f"{file}: truncated: {size} bytes, less than its header")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        described = sorted(_described(name, entry) for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{file}: not a safetensors file (its header is not the JSON it should be)"
        ) from None
    tensors, reached = {}, 0
    for begin, end, name, kind, shape in described:
        if kind not in DTYPES:
            raise UserError(
                f"{file}: {name} is of dtype {kind}, which is unknown here (known: {', '.join(DTYPES)})"
            )
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise UserError(
                f"{file}: {name}, {kind} of shape {list(shape)}, cannot fill bytes {begin} to {end}"
            )
        if begin != reached:
            raise UserError(
                f"{file}: {name} begins at byte {begin} and the tensor before it ends at {reached}"
            )
        tensors[name] = TensorInfo(DTYPES[kind], shape, file, 8 + length + begin, end - begin)
        reached = end
    if 8 + length + reached != size:
        kind = "truncated" if size < 8 + length + reached else "damaged"
        raise UserError(
            f"{file}: {kind}: {size} bytes, and its header tells of {8 + length + reached}"
        )
    return tensors


def _described(name: str, entry: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of a header's entry. Raises ValueError, KeyError or
    TypeError for what is not one.
    """
    (begin, end), kind, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
    if type(kind) is not str or not all(
        type(number) is int and number >= 0 for number in (begin, end, *shape)
    ):
        raise TypeError
    return begin, end, name, kind, tuple(shape)


def _plan_shards(
    directory: Path,
    plan: list[tuple[str, np.dtype, tuple[int, ...]]],
    source: str,
    shard_bytes: int,
) -> list[_Shard]:
    """The tensors in order, as many to a shard as go in."""
    groups, room = [], 0
    for name, dtype, shape in plan:
        size = math.prod(shape) * dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append((name, dtype, shape))
        room -= size
    if len(groups) == 1:
        return [_plan_shard(directory / SINGLE, groups[0], source)]
    return [
        _plan_shard(directory / f"model-{i:05}-of-{len(groups):05}.safetensors", group, source)
        for i, group in enumerate(groups, 1)
    ]


def _plan_shard(
    file: Path, tensors: list[tuple[str, np.dtype, tuple[int, ...]]], source: str
) -> _Shard:
    """Widest dtypes first within the file: each tensor is then aligned to its own items, without
    which torch cannot view it.
    """
    entries, end = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(
        {
            "__metadata__": {
                "format": "pt",
                "source": hashlib.sha256(source.encode()).hexdigest()[:16],
            }
        }
        | entries,
        separators=(",", ":"),
    ).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = {}
    for name, dtype, shape in tensors:
        begin, stop = entries[name]["data_offsets"]
        infos[name] = TensorInfo(dtype, shape, file, len(header) + begin, stop - begin)
    return _Shard(file, header, infos, len(header) + end)


def _is_whole(shard: _Shard) -> bool:
    with open(shard.file, "rb") as file:
        return (
            file.read(len(shard.header)) == shard.header and shard.file.stat().st_size == shard.size
        )


def _bytes(rows: np.ndarray) -> np.ndarray:
    """The same memory as bytes, in C order; a copy if it was in another. (A memoryview of bfloat16
    does not exist.)
    """
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)


def _temporary(file: Path) -> Path:
    return file.with_name(file.name + ".tmp")


def _settle(final: Path) -> None:
    """Gives a file its own name, once what was written under its temporary one is on the disk."""
    _sync(_temporary(final))
    os.replace(_temporary(final), final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
