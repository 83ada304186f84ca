"""A checkpoint's tensors as our variables, straight onto the devices, each of them only its
share.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.hf.architecture import read_json
from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.tensors import Piece, Tensor, fused, tensors
from errors import UserError
from model.config import ModelConfig

BLOCK = 16 * 2**20  # elements of a tensor handled at a time
IGNORED = (".rotary_emb.inv_freq",)  # of old checkpoints: computed, not learnt
SCALE = "_scale_inv"


class HFCheckpoint:
    """The files of a Hugging Face checkpoint of a known model, every tensor of which is there,
    wanted, and of the right shape.

    FP8 weights are DeepSeek's: float8 and beside them `NAME_scale_inv`, a float32 factor for each
    block of, mostly, 128 x 128 (arXiv 2412.19437, section 3.3).

    Raises:
      UserError: a tensor is missing, extra, misshapen or of a type that is not supported; a
        module's copy of a shared matrix is not a copy.
    """

    def __init__(self, directory: Path, model: ModelConfig, files: TensorFiles | None = None):
        self.directory, self.model = directory, model
        self.files = files or TensorFiles(directory)
        self.tensors = [
            tensor
            for tensor in tensors(model, fused(self.files.tensors))
            if tensor.name in self.files.tensors or not tensor.copy_of
        ]
        self._block = _quantised_block(directory)
        self._check()

    def _check(self) -> None:
        there, wanted = self.files.tensors, {tensor.name: tensor for tensor in self.tensors}
        for name, tensor in wanted.items():
            if name not in there:
                raise UserError(
                    f"{self.directory}: tensor {name} is missing (config.json calls for it, {_shape(tensor.shape)})"
                )
            if there[name].shape != tensor.shape:
                raise UserError(
                    f"{self.directory}: tensor {name} is {_shape(there[name].shape)}, and config.json calls for {_shape(tensor.shape)}"
                )
            if there[name].dtype.kind not in "fV":  # ml_dtypes' are void to numpy
                raise UserError(
                    f"{self.directory}: tensor {name} is of type {there[name].dtype}, which is not a weight's"
                )
            if there[name].dtype.itemsize == 1:
                self._check_scale(name)
        for name in there:
            scale_of = name.removesuffix(SCALE)
            if name not in wanted and scale_of not in wanted and not name.endswith(IGNORED):
                raise UserError(
                    f"{self.directory}: tensor {name} is not part of the model that config.json describes"
                )
            if name not in wanted and scale_of in wanted and there[scale_of].dtype.itemsize != 1:
                raise UserError(
                    f"{self.directory}: tensor {name} scales {scale_of}, which is {there[scale_of].dtype} and needs no scale"
                )

    def _check_scale(self, name: str) -> None:
        if len(self.files.tensors[name].shape) != 2:
            raise UserError(
                f"{self.directory}: tensor {name} is float8; only matrices are, in blocks with a scale"
            )
        rows, columns = self.files.tensors[name].shape
        expected = -(-rows // self._block[0]), -(-columns // self._block[1])
        scale = self.files.tensors.get(name + SCALE)
        if scale is None:
            raise UserError(
                f"{self.directory}: tensor {name} is float8, and {name + SCALE} is missing"
            )
        if scale.shape != expected:
            wanted = f"in blocks of {_shape(self._block)} it must be {_shape(expected)}"
            raise UserError(
                f"{self.directory}: tensor {name + SCALE} is {_shape(scale.shape)}; {wanted}"
            )

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor; float8 ones times their scales, in float32."""
        values = self.files.read(name, start, stop)
        if values.dtype.itemsize != 1:
            return values
        high, wide = self._block
        first, last = start // high, -(-stop // high)
        scale = self.files.read(name + SCALE, first, last).astype(np.float32)
        scale = np.repeat(scale, high, axis=0)[start - first * high : stop - first * high]
        return values.astype(np.float32) * np.repeat(scale, wide, axis=1)[:, : values.shape[1]]

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, list[Piece]]]:
        """(first row, rows as pieces of our leaves), BLOCK elements at a time. Of a copy: nothing,
        once it is seen to be one.
        """
        for start, stop in tensor.blocks(BLOCK):
            rows = self.rows(tensor.name, start, stop)
            if tensor.copy_of:
                if not np.array_equal(rows, self.rows(tensor.copy_of, start, stop)):
                    raise UserError(
                        f"{self.directory}: tensor {tensor.name} differs from {tensor.copy_of}; models that do not share it are not supported"
                    )
            else:
                yield start, tensor.decode(rows, start)


def load_checkpoint(
    checkpoint: HFCheckpoint,
    abstract: dict[str, Any],
    done: Callable[[int], None] = lambda elements: None,
) -> dict[str, Any]:
    """The variables {"params", "router"} of a checkpoint. The host holds, of one leaf at a time,
    what its own devices shall have of it.

    Args:
      abstract: the variables as jax.ShapeDtypeStruct, with the shardings they shall have and the
        type they shall be cast to.
      done: told how many elements each leaf has that is loaded.
    """
    of_leaf: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors:
        if tensor.copy_of:
            for _ in checkpoint.pieces(tensor):  # which sees whether it is one
                pass
        for leaf in {part.leaf for part in tensor.parts if not tensor.copy_of}:
            of_leaf.setdefault(leaf, []).append(tensor)

    def array(path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        shares = wanted.sharding.addressable_devices_indices_map(wanted.shape).values()
        boxes = {
            box: np.empty([stop - start for start, stop in box], wanted.dtype)
            for box in {_bounds(share, wanted.shape) for share in shares}
        }
        for tensor in of_leaf[leaf]:
            _fill(boxes, checkpoint, tensor, leaf)
        done(math.prod(wanted.shape))
        return jax.make_array_from_callback(
            wanted.shape, wanted.sharding, lambda share: boxes[_bounds(share, wanted.shape)]
        )

    return jax.tree_util.tree_map_with_path(array, abstract)


Box = tuple[tuple[int, int], ...]  # (start, stop) of each axis


def _bounds(share: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(share, shape, strict=True))


def _fill(
    boxes: dict[Box, np.ndarray], checkpoint: HFCheckpoint, tensor: Tensor, leaf: str
) -> None:
    """Copies what of a tensor lies in the boxes of a leaf. Read once, and not at all if nothing
    does.
    """
    leading = next(part.index for part in tensor.parts if part.leaf == leaf)
    reached = [
        box
        for box in boxes
        if all(start <= at < stop for at, (start, stop) in zip(leading, box, strict=False))
    ]
    for _, pieces in checkpoint.pieces(tensor) if reached else ():
        for part, where, values in pieces:
            for box in reached if part.leaf == leaf else ():
                into = boxes[box][
                    tuple(at - start for at, (start, _) in zip(leading, box, strict=False))
                ]
                _overlay(into, box[len(leading) :], where, values)


def _overlay(into: np.ndarray, bounds: Box, where: tuple[slice, ...], values: np.ndarray) -> None:
    """Copies what of `values`, which stand at `where`, lies within `bounds`."""
    of_box, of_values = [], []
    for (start, stop), cut in zip(bounds, where, strict=True):
        low, high = max(start, cut.start), min(stop, cut.stop)
        if low >= high:
            return
        of_box.append(slice(low - start, high - start))
        of_values.append(slice(low - cut.start, high - cut.start))
    into[tuple(of_box)] = values[tuple(of_values)]


def _quantised_block(directory: Path) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises UserError for a quantisation that is not
    DeepSeek's FP8.
    """
    settings = read_json(directory / "config.json").get("quantization_config") or {}
    method = settings.get("quant_method", "fp8")
    if method != "fp8":
        raise UserError(
            f'{directory / "config.json"}: "quant_method": "{method}" is not supported, only fp8 in blocks with float32 scales'
        )
    block = settings.get("weight_block_size") or (128, 128)
    return int(block[0]), int(block[1])


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
