"""A checkpoint's tensors become our variables, straight on the devices.

Each process reads only what its own devices need.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.layouts import Slice, Tensor

Shard = tuple[Slice, np.ndarray]  # a part of a parameter, and the memory for its values


def load_checkpoint(
    checkpoint: HFCheckpoint,
    abstract: dict[str, Any],
    done: Callable[[int], None] = lambda elements: None,
) -> dict[str, Any]:
    """Loads the variables {"params", "router"} of a checkpoint.

    The host has one leaf at a time in memory, and of that only what its own devices get.

    Args:
      checkpoint: the files.
      abstract: the variables as jax.ShapeDtypeStruct, with the shardings that they get and the
        types that they are cast to.
      done: called after each leaf, with its number of elements.

    Raises:
      UserError: a tensor that should be a copy of another differs from it.
    """
    checkpoint.check_copies()
    tensors_of: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.own_tensors:
        for part in tensor.slices:
            tensors_of.setdefault(part.leaf, []).append(tensor)

    def load_leaf(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one parameter: each distinct shard of this host's devices once."""
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        assert wanted.sharding is not None
        shards: list[Shard] = []
        for index in wanted.sharding.addressable_devices_indices_map(wanted.shape).values():
            part = _slice(leaf, index, wanted.shape)
            if all(part != shard for shard, _ in shards):  # devices may have the same one
                shards.append((part, np.empty(part.shape, wanted.dtype)))
        for tensor in tensors_of[leaf]:
            _fill(shards, checkpoint, tensor)
        done(math.prod(wanted.shape))

        def values_at(index: Any) -> np.ndarray:
            part = _slice(leaf, index, wanted.shape)
            return next(values for shard, values in shards if shard == part)

        return jax.make_array_from_callback(wanted.shape, wanted.sharding, values_at)

    return jax.tree_util.tree_map_with_path(load_leaf, abstract)


def _slice(leaf: str, index: Any, shape: tuple[int, ...]) -> Slice:
    """Returns leaf[index] with the starts and stops that JAX leaves out."""
    return Slice(
        leaf, tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True))
    )


def _fill(shards: list[Shard], checkpoint: HFCheckpoint, tensor: Tensor) -> None:
    """Copies into the shards what they have of a tensor.

    Rows that none of them has are not read.
    """
    for start, stop in checkpoint.blocks(tensor):
        parts = tensor.slices_of(start, stop)
        if not any(part.overlap(shard) for part in parts for shard, _ in shards):
            continue
        for part, values in tensor.decode(checkpoint.rows(tensor.name, start, stop), start):
            for shard, into in shards:
                common = part.overlap(shard)
                if common is not None:
                    into[common.within(shard)] = values[common.within(part)]
