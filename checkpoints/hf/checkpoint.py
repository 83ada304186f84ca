"""The files of a Hugging Face checkpoint, checked against the model that config.json describes."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoints.hf import fp8
from checkpoints.hf.layouts import Tensor
from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.tensors import experts_are_fused, tensors
from errors import UserError
from files import read_json
from model.config import ModelConfig

BLOCK = 16 * 2**20  # elements of a tensor that are in memory at a time
IGNORED = (".rotary_emb.inv_freq",)  # in old checkpoints: computed, not learnt


class HFCheckpoint:
    """The files of a checkpoint of a known model.

    Every tensor of the model is there and has the right shape, and no other tensor is. Float8
    tensors have their scales.

    Attributes:
      directory: where the files are.
      model: the model that config.json describes.
      files: the tensors on disk.
      tensors: which slices of our parameters they are; copies that the checkpoint lacks are left
        out. Embedding and head may have fewer rows than the model's vocabulary: the rows behind
        them are the mean of theirs.

    Raises:
      UserError: a tensor is missing, extra, misshapen or of a type that is not supported.
    """

    def __init__(self, directory: Path, model: ModelConfig):
        self.directory, self.model = directory, model
        self.files = TensorFiles(directory)
        self.tensors = [
            tensor
            for tensor in tensors(model, experts_are_fused(self.files.tensors))
            if tensor.name in self.files.tensors or not tensor.copy_of
        ]
        for tensor in self.tensors:
            self._check(tensor)
        self._check_nothing_else()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows of a tensor as they are stored; float8 times their scales, in float32."""
        count = self.files.tensors[name].shape[0]
        if stop > count:
            known = self.rows(name, min(start, count), count)
            new = np.repeat(self._mean_row(name), stop - max(start, count), axis=0)
            return np.concatenate([known, new])
        rows = self.files.read(name, start, stop)
        if rows.dtype.itemsize != 1:
            return rows
        scale_rows = fp8.scale_rows(start, stop, self._fp8_block)
        scale = self.files.read(name + fp8.SCALE_SUFFIX, *scale_rows)
        return fp8.multiply_out(rows, start, scale, self._fp8_block)

    def blocks(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of rows of a tensor, of at most about BLOCK elements."""
        return tensor.blocks(BLOCK)

    def check_copies(self) -> None:
        """Reads the tensors that repeat others.

        Raises:
          UserError: one of them differs from what it repeats.
        """
        for tensor in [tensor for tensor in self.tensors if tensor.copy_of]:
            for start, stop in self.blocks(tensor):
                rows = self.rows(tensor.name, start, stop)
                if not np.array_equal(rows, self.rows(tensor.copy_of, start, stop)):
                    raise UserError(
                        f"{self.directory}: tensor {tensor.name} differs from {tensor.copy_of};"
                        " models that do not share it are not supported"
                    )

    @property
    def own_tensors(self) -> list[Tensor]:
        """The tensors that are no copies of others; they have every parameter once."""
        return [tensor for tensor in self.tensors if not tensor.copy_of]

    @functools.lru_cache(maxsize=2)  # noqa: B019 a checkpoint lives as long as its command
    def _mean_row(self, name: str) -> np.ndarray:
        """Returns the mean of a matrix's rows on disk, [1, columns], in their type."""
        count, columns = self.files.tensors[name].shape
        total, step = np.zeros(columns), max(1, BLOCK // columns)
        for start in range(0, count, step):
            rows = self.rows(name, start, min(start + step, count))
            total += rows.astype(np.float64).sum(axis=0)
        return (total / count).astype(self.rows(name, 0, 1).dtype)[None]

    @functools.cached_property
    def _fp8_block(self) -> tuple[int, int]:
        config = self.directory / "config.json"
        return fp8.block_shape(read_json(config), config)

    def _check(self, tensor: Tensor) -> None:
        """Raises UserError if a tensor is not on disk as the model wants it."""
        name, there = tensor.name, self.files.tensors.get(tensor.name)
        if there is None:
            raise self._error(
                f"{name} is missing (config.json calls for it, {_shape(tensor.shape)})"
            )
        if there.shape != tensor.shape and not self._grows(tensor, there.shape):
            raise self._error(
                f"{name} is {_shape(there.shape)}, and config.json calls for {_shape(tensor.shape)}"
            )
        if there.dtype.kind not in "fV":  # the types of ml_dtypes are void to numpy
            raise self._error(f"{name} is of type {there.dtype}, which is not a weight's")
        if there.dtype.itemsize == 1:
            self._check_scale(name, there.shape)

    def _grows(self, tensor: Tensor, there: tuple[int, ...]) -> bool:
        """Returns whether a tensor has as many rows as config.json says, and the model has more."""
        V, before = self.model.vocab_size, read_json(self.directory / "config.json")["vocab_size"]
        return before < V and tensor.shape[0] == V and there == (before, *tensor.shape[1:])

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless a float8 tensor is a matrix with the scales of its blocks."""
        if len(shape) != 2:
            raise self._error(f"{name} is float8; only matrices are, in blocks with a scale")
        scale_name = name + fp8.SCALE_SUFFIX
        scale = self.files.tensors.get(scale_name)
        if scale is None:
            raise self._error(f"{name} is float8, and {scale_name} is missing")
        expected = fp8.scale_shape((shape[0], shape[1]), self._fp8_block)
        if scale.shape != expected:
            raise self._error(
                f"{scale_name} is {_shape(scale.shape)}; in blocks of {_shape(self._fp8_block)}"
                f" it must be {_shape(expected)}"
            )

    def _check_nothing_else(self) -> None:
        """Raises UserError if there is a tensor that the model does not have."""
        wanted = {tensor.name for tensor in self.tensors}
        for name in [name for name in self.files.tensors if name not in wanted]:
            scaled = name.removesuffix(fp8.SCALE_SUFFIX)
            if scaled not in wanted and not name.endswith(IGNORED):
                raise self._error(f"{name} is not part of the model that config.json describes")
            if scaled in wanted and self.files.tensors[scaled].dtype.itemsize != 1:
                raise self._error(
                    f"{name} scales {scaled}, which is {self.files.tensors[scaled].dtype} and"
                    " needs no scale"
                )

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.directory}: tensor {what}")


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
