"""Rotary position embedding (arXiv 2104.09864), in the two layouts that checkpoints use.

YaRN (arXiv 2309.00071) stretches it to longer contexts. In this file P is the number of pairs of
channels that turn, half their width.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from model.layer_configs import RopeConfig


def frequencies(width: int, rope: RopeConfig) -> np.ndarray:
    """Returns the radians per token of each pair of channels, [width / 2] float64.

    They are theta ** (-2 i / width), and with `rope.factor` above 1 YaRN's "NTK by parts": a pair
    that turns more than beta_fast times within the old context keeps its speed, one that turns less
    than beta_slow times is slowed by the factor, and between the two channels where that happens a
    ramp leads from one to the other (arXiv 2309.00071, eq. 18-21 and 23; the ramp is over channels,
    as in the authors' code and every released model, not over wavelengths as printed).
    """
    pair = np.arange(width // 2)
    plain = rope.rope_theta ** (-2 * pair / width)
    if rope.factor == 1:
        return plain

    def channel(turns: float) -> float:
        """Returns the channel where a pair turns so many times within the old context."""
        return (
            width
            * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(rope.rope_theta))
        )

    first, last = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    slowed = np.clip((pair - first) / (last - first if last != first else 0.001), 0, 1)
    return plain * (1 - slowed) + plain / rope.factor * slowed


def rope_angles(positions_BT: Array, width: int, rope: RopeConfig) -> Array:
    """Returns the angle of each pair of channels at each position, [B, T, width / 2] float32."""
    return positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(
        frequencies(width, rope), jnp.float32
    )


def rotate(x_BTNH: Array, angles_BTP: Array, rope: RopeConfig, *, interleaved: bool) -> Array:
    """Rotates the first 2 P channels of each head and leaves the rest, in x's dtype.

    The rotated channels are multiplied by `rope.attention_factor`. `interleaved` pairs neighbouring
    channels, see `rotate_interleaved`; otherwise see `rotate_halves`.
    """
    width = 2 * angles_BTP.shape[-1]
    if width == 0:
        return x_BTNH
    turn = rotate_interleaved if interleaved else rotate_halves
    turned_BTNH = turn(x_BTNH[..., :width], angles_BTP, rope.attention_factor)
    return (
        turned_BTNH
        if width == x_BTNH.shape[-1]
        else jnp.concatenate([turned_BTNH, x_BTNH[..., width:]], axis=-1)
    )


def rotate_interleaved(x_BTNH: Array, angles_BTP: Array, scale: float = 1.0) -> Array:
    """Rotates the pairs (0, 1), (2, 3), ... as MLA does, in x's dtype. H is 2 P."""
    even, odd = x_BTNH[..., 0::2].astype(jnp.float32), x_BTNH[..., 1::2].astype(jnp.float32)
    cos, sin = scaled_cos_sin(angles_BTP, scale)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def rotate_halves(x_BTNH: Array, angles_BTP: Array, scale: float = 1.0) -> Array:
    """Rotates the pairs (0, P), (1, P + 1), ... as Qwen3 and the V3.2 indexer do, in x's dtype.

    H is 2 P.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = scaled_cos_sin(angles_BTP, scale)
    return jnp.concatenate(
        [first * cos - second * sin, first * sin + second * cos], axis=-1
    ).astype(x_BTNH.dtype)


def scaled_cos_sin(angles_BTP: Array, scale: float) -> tuple[Array, Array]:
    """Returns the scaled cosine and sine of the angles, [B, T, 1, P] each."""
    cos, sin = jnp.cos(angles_BTP)[:, :, None], jnp.sin(angles_BTP)[:, :, None]
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)
