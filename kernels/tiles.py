"""Building blocks of the Pallas kernels that work tile by tile.

They are products, moves between rows, columns and lanes, and sums that stay spread over a register
until the last tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.bitmask import LANES
from kernels.reference import MASKED

F32 = jnp.float32
SUBLANES = 8  # rows of a register

# A running maximum begins here: the exponential of a masked logit below it is 0 even in a row
# without any key.
INITIAL_MAX = MASKED / 2

# MiB of vector memory of a core, by JAX's `device_kind`.
VMEM_MIB = {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5": 64, "TPU v6 lite": 128, "TPU7x": 64}
MIN_VMEM = 64 * 2**20  # bytes that a core must have: the kernels ask for 60 MiB

# Bytes that a kernel's two tables of tiles (which have a key, which to fetch) may take of the
# megabyte of scalar memory.
TABLE_BYTES = 640 * 2**10


def map_row_groups(function: Callable[..., Any], table: tuple[int, int], *rows: Any) -> Any:
    """Applies a kernel to groups of batch rows, so small that their tables of tiles fit.

    A kernel has two tables in scalar memory, TABLE_BYTES together.

    Args:
      function: takes pytrees of arrays [B, ...] and returns one.
      table: the shape of one batch row's part of a table.
      rows: the arguments of the function.

    Returns: the results of all groups of rows, joined along B.
    """
    B = jax.tree.leaves(rows)[0].shape[0]
    table_bytes = 4 * table[0] * -(-table[1] // LANES) * LANES  # the compiler pads to whole lanes
    divisors = (count for count in range(1, B + 1) if B % count == 0)
    size = max((n for n in divisors if 2 * n * table_bytes <= TABLE_BYTES), default=1)
    if size == B:
        return function(*rows)
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
    results = lax.map(lambda group: function(*group), groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def vmem_bytes(device_kind: str) -> int:
    """Returns the vector memory of a core; for an unknown device, what most have at least."""
    return VMEM_MIB.get(device_kind, 64) * 2**20


def padded(x: Array, axis: int, size: int) -> Array:
    """Pads an axis with zeros at its end, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])


def dot(x: Array, y: Array, over: tuple[int, int]) -> Array:
    """Multiplies two matrices, summed over one axis of each, into float32.

    bfloat16 is multiplied as it is and float32 at full precision. Both are named explicitly:
    otherwise JAX takes jax_default_matmul_precision, and Mosaic refuses bfloat16 at "highest".
    """
    precision = lax.Precision.HIGHEST if x.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=F32
    )


def to_column(row_1Q: Array) -> Array:
    """Turns a row [1, Q] into a column [Q, 1]."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T[:, :1]


def broadcast_lanes(x_QL: Array, width: int) -> Array:
    """Widens [Q, 128], equal in all lanes, to [Q, width].

    The result is copies of whole registers: nothing moves between lanes.
    """
    return jnp.tile(x_QL, (1, -(-width // LANES)))[:, :width]


def fold_lanes(fold: Callable[[Array, Array], Array], x_QK: Array) -> Array:
    """Folds [Q, K] to [Q, 128]. A kernel folds the lanes once, after its last tile."""
    return fold_pairwise(fold, jnp.split(x_QK, x_QK.shape[1] // LANES, axis=1))


def fold_sublanes(fold: Callable[[Array, Array], Array], x_KQ: Array) -> Array:
    """Folds [K, Q] to [8, Q]. A kernel folds the sublanes once, after its last tile."""
    return fold_pairwise(fold, jnp.split(x_KQ, x_KQ.shape[0] // SUBLANES, axis=0))


def fold_pairwise(fold: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """Folds a list pair by pair: in a chain each step would wait for the one before."""
    while len(parts) > 1:
        parts = [
            fold(*parts[at : at + 2]) if at + 1 < len(parts) else parts[at]
            for at in range(0, len(parts), 2)
        ]
    return parts[0]
