"""Normalisations, computed in float32 whatever the compute type. The backward pass keeps their
input alone and computes the rest again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.sharding import named


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def rms_norm(x_D: Array, scale_D: Array, eps: float, zero_centred: bool = False) -> Array:
    """x / rms(x) * scale over the last axis (arXiv 1910.07467, eq. 4); zero-centred: times 1 +
    scale. Returns x's dtype.
    """
    x32 = x_D.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * (1 + scale_D if zero_centred else scale_D)).astype(x_D.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x_D: Array, scale_D: Array, bias_D: Array, eps: float) -> Array:
    """(x - mean) / std * scale + bias over the last axis (arXiv 1607.06450). Returns x's dtype."""
    x32 = x_D.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse_std * scale_D + bias_D).astype(x_D.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale. Both kinds begin as a plain division by the root mean square."""

    eps: float
    kind: str = "scale"  # "scale" | "zero_centred"
    axis: str = "width"

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        zero_centred = self.kind == "zero_centred"
        init = nn.initializers.zeros if zero_centred else nn.initializers.ones
        scale_D = self.param("scale", named(init, (self.axis,)), (x_D.shape[-1],), jnp.float32)
        return rms_norm(x_D, scale_D, self.eps, zero_centred)


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias."""

    eps: float
    axis: str = "width"

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        scale_D = self.param(
            "scale", named(nn.initializers.ones, (self.axis,)), (x_D.shape[-1],), jnp.float32
        )
        bias_D = self.param(
            "bias", named(nn.initializers.zeros, (self.axis,)), (x_D.shape[-1],), jnp.float32
        )
        return layer_norm(x_D, scale_D, bias_D, self.eps)
