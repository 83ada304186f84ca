"""What the Pallas kernels over tiles share: products, the turning of rows into columns, sums that
wait for the last tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.bitmask import LANES
from kernels.reference import MASKED

F32 = jnp.float32
MIN_VMEM = 64 * 2**20  # bytes of vector memory that a core must have: the kernels ask for 60 MiB
SUBLANES = 8  # rows of a register
INITIAL_MAX = (
    MASKED / 2
    # what a running maximum begins at: below it the exponential of a masked logit is 0 even in a row
    # without any key
)

VMEM_MIB = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5": 64,
    "TPU v6 lite": 128,
    "TPU7x": 64,
}  # MiB of a core, by JAX's `device_kind`
TABLE_BYTES = (
    640 * 2**10
    # bytes of a megabyte of scalar memory that the two tables of tiles may take, one that says which
    # are held and one what to fetch
)


def map_row_groups(function: Callable, table: tuple[int, int], *rows):
    """A function of arrays [B, ...], so many rows at a time as have room for their tables, each of
    this shape, in scalar memory. Its results are joined.
    """
    B = jax.tree.leaves(rows)[0].shape[0]
    table_bytes = 4 * table[0] * -(-table[1] // LANES) * LANES  # as the compiler lays them out
    at_once = max(
        (
            count
            for count in range(1, B + 1)
            if B % count == 0 and 2 * count * table_bytes <= TABLE_BYTES
        ),
        default=1,
    )
    if at_once == B:
        return function(*rows)
    parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), rows)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), lax.map(lambda part: function(*part), parts)
    )


def vmem_bytes(device_kind: str) -> int:
    """Of a core; of a device that is not in the table what most have at least."""
    return VMEM_MIB.get(device_kind, 64) * 2**20


def padded(x: Array, axis: int, size: int) -> Array:
    """Zeros behind an axis, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])


def dot(x: Array, y: Array, over: tuple[int, int]) -> Array:
    """A product summed over these axes, in float32: of bfloat16 as it is, of float32 at full
    precision. Both are said: of what is not, JAX takes jax_default_matmul_precision, and Mosaic
    refuses bfloat16 at "highest".
    """
    precision = lax.Precision.HIGHEST if x.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=F32
    )


def to_column(row_1Q: Array) -> Array:
    """[1, Q] to [Q, 1]."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T[:, :1]


def broadcast_lanes(x_QL: Array, width: int) -> Array:
    """[Q, width] of what stands in every one of 128 lanes: whole registers again, nothing moves
    between lanes.
    """
    return jnp.tile(x_QL, (1, -(-width // LANES)))[:, :width]


def fold_lanes(fold: Callable[[Array, Array], Array], x_QK: Array) -> Array:
    """[Q, K] folded to [Q, 128]: what is left of it waits until the last tile."""
    return fold_pairwise(fold, jnp.split(x_QK, x_QK.shape[1] // LANES, axis=1))


def fold_sublanes(fold: Callable[[Array, Array], Array], x_KQ: Array) -> Array:
    """[K, Q] folded to [8, Q]."""
    return fold_pairwise(fold, jnp.split(x_KQ, x_KQ.shape[0] // SUBLANES, axis=0))


def fold_pairwise(fold: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """Folded pair by pair: in a chain each would wait for the one before."""
    while len(parts) > 1:
        parts = [
            fold(*parts[at : at + 2]) if at + 1 < len(parts) else parts[at]
            for at in range(0, len(parts), 2)
        ]
    return parts[0]
