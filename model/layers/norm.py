"""Normalisations, computed in float32 whatever the compute type.

The backward pass keeps their input alone and computes the rest again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.layers.parameter import parameter


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def rms_norm(x_D: Array, scale_D: Array, eps: float, zero_centred: bool = False) -> Array:
    """Computes x / rms(x) * scale over the last axis (arXiv 1910.07467, eq. 4), in x's dtype.

    Zero-centred, it multiplies by 1 + scale.
    """
    x32 = x_D.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * (1 + scale_D if zero_centred else scale_D)).astype(x_D.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x_D: Array, scale_D: Array, bias_D: Array, eps: float) -> Array:
    """Computes (x - mean) / std * scale + bias over the last axis (arXiv 1607.06450)."""
    x32 = x_D.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse_std * scale_D + bias_D).astype(x_D.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale. Both kinds begin as a plain division by the root mean square.

    kind: "scale" | "zero_centred".
    axis: the logical name of the axis that is normalised.
    """

    eps: float
    kind: str = "scale"
    axis: str = "embed"

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        """Normalises the last axis."""
        zero_centred = self.kind == "zero_centred"
        init = nn.initializers.zeros if zero_centred else nn.initializers.ones
        scale_D = _channels(self, "scale", init, x_D.shape[-1], self.axis)
        return rms_norm(x_D, scale_D, self.eps, zero_centred)


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias. `axis` is the logical name of what is normalised."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        """Normalises the last axis."""
        scale_D = _channels(self, "scale", nn.initializers.ones, x_D.shape[-1], self.axis)
        bias_D = _channels(self, "bias", nn.initializers.zeros, x_D.shape[-1], self.axis)
        return layer_norm(x_D, scale_D, bias_D, self.eps)


def _channels(module: nn.Module, name: str, init, size: int, axis: str) -> Array:
    return parameter(module, name, init, (size,), (axis,), per_channel=True, keep_float32=True)
