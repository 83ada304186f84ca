"""Safetensors files, read a few rows at a time.

So memory has a part of one tensor however large the checkpoint is. A file is

    8 bytes: length of the header | header, JSON: name -> dtype, shape, data_offsets | the tensors'
      bytes, one after another, little-endian

Reads are plain ones on purpose: mapped pages would count as this process's memory, and the numpy
interface of the safetensors package has no bfloat16 and no float8.
"""

import json
import math
import os
import re
from collections import Counter
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; what the safetensors package allows
MOST_AXES, MOST_BYTES = 32, 2**62  # of a tensor that an array can have
LONGEST_WORD = 200  # characters of a name or a type that an error repeats


class TensorInfo(NamedTuple):
    """Describes a tensor of a file: its `bytes` bytes begin at byte `offset` of `file`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


class TensorFiles:
    """The tensors of a directory.

    They are those of model.safetensors, or of the files that model.safetensors.index.json names, or
    else of every *.safetensors. Only headers are read here, and no file is kept open: a checkpoint
    may have hundreds.

    Attributes:
      tensors: where each tensor lies, by its name.

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
            self._read_indexed()
        else:
            self._read_all()

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The type of each tensor, by its name."""
        return {name: info.dtype for name, info in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows start to stop of a tensor's first axis (a scalar whole), as a copy.

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
        into = as_bytes(rows)
        with open(info.file, "rb", buffering=0) as file:
            file.seek(offset)
            while into:  # one read returns 2 GiB at most
                count = file.readinto(into)
                if not count:
                    raise UserError(f"{info.file}: ends within {name}; it is truncated")
                into = into[count:]
        return rows

    def _read_indexed(self) -> None:
        """Reads the headers of the files that the index names."""
        index = self.directory / INDEX
        file_of = _weight_map(index)
        headers = {}
        for file in sorted(set(file_of.values())):
            if not os.path.exists(self.directory / file):
                raise UserError(f"{index}: names {file[:100]}, which is not there")
            headers[file] = _read_header(self.directory / file)
        for name, file in file_of.items():
            if name not in headers[file]:
                raise UserError(f"{index}: says that {name} is in {file}, which lacks it")
            self.tensors[name] = headers[file][name]

    def _read_all(self) -> None:
        """Reads the headers of all files, in a directory without an index."""
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
                    f"{self.directory}: {count} of {int(total)} shards, and no {INDEX};"
                    " it was not written or downloaded to its end"
                )
        for file in files:
            for name, info in _read_header(file).items():
                if name in self.tensors:
                    raise UserError(
                        f"{file}: has {name}, and so has {self.tensors[name].file.name}"
                    )
                self.tensors[name] = info


def as_bytes(rows: np.ndarray) -> memoryview:
    """Returns the same memory as bytes in C order, or a copy if it is in another order."""
    # A memoryview of bfloat16 does not exist.
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def _weight_map(index: Path) -> dict[str, str]:
    """Returns which file each tensor is in. Raises UserError if the index is not one."""
    try:
        file_of = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in file_of.values()):
            raise TypeError
    except OSError as failure:
        raise UserError(f"{index}: {failure.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{index}: not an index of safetensors files (a JSON object with a weight_map)"
        ) from None
    return file_of


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one file. Raises UserError unless they fill it exactly."""
    text, size = _header_text(file)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        described = sorted(_described(name, entry) for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{file}: not a safetensors file (its header is not the JSON it should be)"
        ) from None
    tensors, reached, data = {}, 0, 8 + len(text)
    for begin, end, name, kind, shape in described:
        shown = name[:LONGEST_WORD]
        if kind not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"{file}: {shown} is of dtype {kind[:LONGEST_WORD]}, which is unknown here"
                f" (known: {known})"
            )
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise UserError(
                f"{file}: {shown}, {kind} of shape {list(shape)}, cannot fill bytes {begin} to"
                f" {end}"
            )
        if begin != reached:
            raise UserError(
                f"{file}: {shown} begins at byte {begin} and the tensor before it ends at {reached}"
            )
        tensors[name] = TensorInfo(DTYPES[kind], shape, file, data + begin, end - begin)
        reached = end
    if data + reached != size:
        kind = "truncated" if size < data + reached else "damaged"
        raise UserError(f"{file}: {kind}: {size} bytes, and its header tells of {data + reached}")
    return tensors


def _header_text(file: Path) -> tuple[bytes, int]:
    """Returns a file's header, still JSON, and the size of the file in bytes."""
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
    return text, size


def _described(name: str, entry: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Returns (begin, end, name, dtype, shape) of a header's entry.

    Raises ValueError, KeyError or TypeError if it is not one, or no array has such a shape.
    """
    (begin, end), kind, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
    name.encode()  # half a character, which JSON can write, is no text
    if type(kind) is not str or len(shape) > MOST_AXES:
        raise TypeError
    numbers = (begin, end, *shape)
    if not all(type(number) is int and 0 <= number <= MOST_BYTES for number in numbers):
        raise TypeError
    if math.prod(size or 1 for size in shape) > MOST_BYTES:
        raise ValueError
    return begin, end, name, kind, tuple(shape)
