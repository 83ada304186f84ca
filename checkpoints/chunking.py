"""Cuts large arrays into chunks, each of which is compressed, written and read by itself."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# A chunk is at most this large, and nothing below the other size is worth a chunk of its own.
CHUNK_BYTES, LEAST_CHUNK_BYTES = 64 * 2**20, 2**20


def chunk_shape(leaf: jax.ShapeDtypeStruct) -> list[int]:
    """Returns the chunks of an array that one process writes alone.

    A chunk is one matrix of a stack, if the matrix is large; and of that, rows in as equal parts as
    do not exceed a chunk.
    """
    chunk = [max(1, size) for size in leaf.shape]
    for axis, size in enumerate(chunk):
        entry = math.prod(chunk[axis + 1 :]) * leaf.dtype.itemsize
        if _is_stack(chunk, axis, leaf.dtype.itemsize):
            count = size
        else:
            count = math.ceil(size / max(1, CHUNK_BYTES // entry))
        chunk[axis] = math.ceil(size / count)
        if chunk[axis] > 1:
            break
    return chunk


def save_args(leaf: Any) -> ocp.SaveArgs:
    """Returns how Orbax cuts what a device has of an array.

    A large array is cut so that each stacked matrix is compressed, and can be read, without the
    rest.
    """
    sharded = isinstance(leaf, jax.Array)
    shard = leaf.sharding.shard_shape(leaf.shape) if sharded else np.shape(leaf)
    if math.prod(shard) * leaf.dtype.itemsize <= CHUNK_BYTES:
        return ocp.SaveArgs()
    axes = tuple(axis for axis in range(len(shard)) if _is_stack(shard, axis, leaf.dtype.itemsize))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def _is_stack(shape: Sequence[int], axis: int, itemsize: int) -> bool:
    """Returns whether an axis stacks arrays, at least matrices, that are worth chunks."""
    matrices = len(shape) - axis > 2
    return matrices and math.prod(shape[axis + 1 :]) * itemsize >= LEAST_CHUNK_BYTES
