"""Packed rows: which tokens of a row belong together."""

import jax.numpy as jnp
from jax import Array


def shift_left(x_BT: Array, by: int) -> Array:
    """x[t + by] at t, zeros at the end."""
    return jnp.pad(x_BT[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x_BT.ndim - 2))


def same_segment(segments_BT: Array, ahead: int) -> Array:
    """Whether the token `ahead` places on is of the same segment. [B, T] bool."""
    return (shift_left(segments_BT, ahead) == segments_BT) & (segments_BT > 0)
