"""A tensor of a Hugging Face checkpoint as slices of our parameters, a few rows at a time.

A tensor there belongs to one layer, and to one expert. A parameter of ours is stacked over the
layers that are scanned together, and over experts. So a tensor is a `Slice` of one parameter, or of
several, and its rows are in another order:

    tensors of a checkpoint, [out, in] each          params/layers_1/block_0/moe/up,
                                                     [layer, expert, in, out]
    model.layers.1.mlp.experts.0.up_proj.weight  ->      [0:1, 0:1, :, :]
    model.layers.1.mlp.experts.1.up_proj.weight  ->      [0:1, 1:2, :, :]
    model.layers.2.mlp.experts.0.up_proj.weight  ->      [1:2, 0:1, :, :]
    model.layers.2.mlp.experts.1.up_proj.weight  ->      [1:2, 1:2, :, :]

`Tensor.decode` turns rows of a tensor into values of our slices, `Tensor.encode` turns them back.
Neither side ever needs a whole tensor in memory.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Slice(NamedTuple):
    """The part `leaf[index]` of one of our parameters.

    Attributes:
      leaf: the path of the parameter, such as "params/layers_1/block_0/moe/gate".
      index: one slice for each axis, with its start and its stop and without a step.
    """

    leaf: str
    index: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice's values; the axes of layer and expert stay, with size 1."""
        return tuple(cut.stop - cut.start for cut in self.index)

    def overlap(self, other: "Slice") -> "Slice | None":
        """Returns the part that two slices share, or None if they share nothing."""
        if self.leaf != other.leaf:
            return None
        index = tuple(
            slice(max(one.start, two.start), min(one.stop, two.stop))
            for one, two in zip(self.index, other.index, strict=True)
        )
        return Slice(self.leaf, index) if all(cut.start < cut.stop for cut in index) else None

    def within(self, outer: "Slice") -> tuple[slice, ...]:
        """Returns the index of this slice in the values of `outer`, a slice that contains it."""
        return tuple(
            slice(cut.start - around.start, cut.stop - around.start)
            for cut, around in zip(self.index, outer.index, strict=True)
        )


def whole(leaf: str, stacked: tuple[int, ...], shape: tuple[int, ...]) -> Slice:
    """Returns the slice of `leaf` that is one entry of its stacked axes.

    Args:
      leaf: the path of the parameter.
      stacked: the place on its leading axes: the layer, and the expert.
      shape: the axes behind those, on which the slice is whole.
    """
    return Slice(leaf, (*(slice(i, i + 1) for i in stacked), *(slice(0, size) for size in shape)))


class Layout(Protocol):
    """Converts rows of a tensor to the values of our slices and back, but for their shapes."""

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the values of each slice; `Tensor.decode` gives them their shapes."""
        ...

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the rows of these values; `Tensor.encode` gives them their shape."""
        ...


@dataclasses.dataclass(frozen=True)
class SameOrder:
    """Embeddings, norms and biases stay as they are."""

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the rows."""
        return [rows]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the values."""
        return values[0]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """Matrices are [out, in] in torch and [in, out] here.

    The rows of several slices may be interleaved by group, mostly by head: each group has first its
    rows of the first slice, then those of the second, and so on.

    Attributes:
      columns: inputs of the matrix.
      widths: rows of each slice in one group.
    """

    columns: int
    widths: tuple[int, ...]

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns [in, out] of each slice."""
        groups = rows.reshape(-1, sum(self.widths), self.columns)
        parts = np.split(groups, np.cumsum(self.widths)[:-1], axis=1)
        return [part.reshape(-1, self.columns).T for part in parts]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns [groups, rows of a group, in]."""
        parts = [
            value.reshape(self.columns, -1).T.reshape(-1, width, self.columns)
            for value, width in zip(values, self.widths, strict=True)
        ]
        return np.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """The matrices of all experts in one tensor [E, out, in], here [E, in, out].

    Transformers has them so in memory, and saves them so if it is told not to take them apart. The
    rows of several slices (gate and up) follow each other within an expert.

    Attributes:
      columns: inputs of the matrices.
      widths: rows of each slice.
    """

    columns: int
    widths: tuple[int, ...]

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns [E, in, out] of each slice."""
        parts = np.split(rows, np.cumsum(self.widths)[:-1], axis=1)
        return [part.swapaxes(1, 2) for part in parts]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns [E, out, in]."""
        parts = [
            value.reshape(-1, self.columns, width).swapaxes(1, 2)
            for value, width in zip(values, self.widths, strict=True)
        ]
        return np.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class ConvKernel:
    """Depthwise convolutions have their oldest input first in torch, and their newest here.

    A Conv1d is [channels, 1, kernel size] in torch, and [kernel size, heads, width] here. The
    channels of several slices follow each other.

    Attributes:
      kernel_size: inputs that the convolution reads.
      channels: of each slice.
    """

    kernel_size: int
    channels: tuple[int, ...]

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns [kernel size, channels] of each slice."""
        parts = np.split(rows[:, 0], np.cumsum(self.channels)[:-1])
        return [part.T[::-1] for part in parts]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns [channels, kernel size]."""
        return np.concatenate([value.reshape(self.kernel_size, -1)[::-1].T for value in values])


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and the slices of our parameters that it consists of.

    Attributes:
      name: its name in the checkpoint.
      shape: its shape there.
      layout: how its rows become values of our slices.
      slices: the parts of our parameters that the whole tensor is.
      axis: the axis of our parameters along which the tensor's rows run.
      step: the number of rows that cannot be taken apart, such as those of one head.
      copy_of: the tensor that this one repeats, if it does; it may then be missing.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    slices: tuple[Slice, ...]
    axis: int
    step: int = 1
    copy_of: str = ""

    def as_copy_of(self, name: str) -> "Tensor":
        """Returns this tensor as one that repeats another, which has this name."""
        return dataclasses.replace(self, copy_of=name)

    def blocks(self, most: int) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of consecutive rows, of at most about `most` elements each."""
        rows = self.shape[0]
        count = max(1, most // (self.step * math.prod(self.shape[1:]))) * self.step
        return ((start, min(start + count, rows)) for start in range(0, rows, count))

    def slices_of(self, start: int, stop: int) -> list[Slice]:
        """Returns the parts of our parameters that the rows from `start` to `stop` are."""
        steps = self.shape[0] // self.step
        found = []
        for leaf, index in self.slices:
            size = (index[self.axis].stop - index[self.axis].start) // steps
            cut = slice(start // self.step * size, stop // self.step * size)
            found.append(Slice(leaf, (*index[: self.axis], cut, *index[self.axis + 1 :])))
        return found

    def decode(self, rows: np.ndarray, start: int) -> list[tuple[Slice, np.ndarray]]:
        """Returns the slices, and their values, of the rows from `start` on."""
        slices = self.slices_of(start, start + len(rows))
        values = self.layout.decode(rows)
        return [(part, one.reshape(part.shape)) for part, one in zip(slices, values, strict=True)]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the rows whose `slices_of` have these values."""
        return self.layout.encode(values).reshape(-1, *self.shape[1:])
