"""Keys in four bits, to estimate attention by (Twilight, arXiv 2502.02770).

A code of 0 .. 15 says where a channel is between the least and the largest of its group:

    x ~ low + step * code,    step = (largest - least) / 15

For 64 bfloat16 channels that is 36 bytes instead of 128.
"""

import flax.struct
import jax.numpy as jnp
from jax import Array

LEVELS = 15


@flax.struct.dataclass
class Int4:
    """Quantised keys.

    code: [..., groups, group_size / 2] uint8, the even channel in the low half.
    low, step: [..., groups] of the keys' dtype.
    """

    code: Array
    low: Array
    step: Array


def quantise(x: Array, group_size: int) -> Int4:
    """Quantises [..., width] in groups of channels, an even number each; the last may be less."""
    *rows, width = x.shape
    groups = -(-width // group_size)
    # The last channel again, so that padding widens nobody's range.
    x = jnp.pad(x, [(0, 0)] * len(rows) + [(0, groups * group_size - width)], mode="edge").reshape(
        *rows, groups, group_size
    )
    low, largest = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
    low32 = low.astype(jnp.float32)
    # The step is rounded to what is stored, so that codes undo the rounding.
    step = ((largest.astype(jnp.float32) - low32) / LEVELS).astype(x.dtype)
    divisor = jnp.maximum(step.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    code = (x.astype(jnp.float32) - low32[..., None]) / divisor[..., None]
    code = jnp.clip(jnp.round(code), 0, LEVELS).astype(jnp.uint8)
    return Int4(code[..., ::2] | (code[..., 1::2] << 4), low, step)


def dequantise(keys: Int4, width: int) -> Array:
    """Returns the keys [..., width] in their dtype."""
    code = jnp.stack([keys.code & LEVELS, keys.code >> 4], axis=-1).reshape(
        *keys.code.shape[:-1], -1
    )
    x = keys.low[..., None] + keys.step[..., None] * code.astype(keys.low.dtype)
    return x.reshape(*x.shape[:-2], -1)[..., :width]
