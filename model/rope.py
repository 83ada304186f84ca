"""Rotary position embedding (arXiv 2104.09864), in the two layouts that checkpoints use."""

import jax.numpy as jnp
from jax import Array


def rope_angles(positions_BT: Array, width: int, theta: float) -> Array:
    """Angle of each pair of channels at each position: position * theta ** (-2 i / width). Returns [B, T, width / 2] float32."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions_BT.astype(jnp.float32)[..., None] * frequency


def rotate_interleaved(x_BTNH: Array, angles_BTP: Array) -> Array:
    """Rotates the pairs (0, 1), (2, 3), ... as MLA does. x is [B, T, N, H] with H = 2 P; returns its dtype."""
    even, odd = x_BTNH[..., 0::2].astype(jnp.float32), x_BTNH[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angles_BTP)[:, :, None], jnp.sin(angles_BTP)[:, :, None]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def rotate_halves(x_BTNH: Array, angles_BTP: Array) -> Array:
    """Rotates the pairs (0, P), (1, P + 1), ... as the V3.2 indexer does. x is [B, T, N, H] with H = 2 P; returns its dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles_BTP)[:, :, None], jnp.sin(angles_BTP)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_BTNH.dtype)
