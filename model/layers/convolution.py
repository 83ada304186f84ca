"""Short causal convolutions over time, channel by channel, inside each segment.

Letters: K weights of a channel's kernel; P = K - 1, the past inputs that reach a token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.layers.parameter import parameter


def causal_convolution(
    x_BTX: Array,
    kernel_KX: Array,
    segments_BT: Array,
    past_BPX: Array | None,
    every: bool = False,
) -> tuple[Array, Array]:
    """Computes y[t] = sum over k < K of kernel[k] * x[t - k], as far as the segment reaches back.

    Args:
      x_BTX: X stands for any axes of channels.
      kernel_KX: K weights of each channel, that of the token itself first.
      segments_BT: the segment of each token, ascending; 0 is padding.
      past_BPX: the P inputs before x, of the segment that x begins with. Without them the
        segments of x begin in x.
      every: returns the inputs from the first of `past` on, [B, P + T, X], in place of the last:
        those before the token at index t are the P from t on. There is one segment.

    Returns:
      y_BTX, and the last inputs recent_BPX, which the tokens after the last that is no padding
      need: zeros where its segment does not reach.
    """
    (B, T, *X), P = x_BTX.shape, kernel_KX.shape[0] - 1
    per_channel = (1,) * len(X)
    before_BPX = (
        jnp.zeros((B, P, *X), x_BTX.dtype) if past_BPX is None else past_BPX.astype(x_BTX.dtype)
    )
    all_BSX = jnp.concatenate([before_BPX, x_BTX], axis=1)
    segments_BS = jnp.concatenate(
        [jnp.broadcast_to(segments_BT[:, :1], (B, P)), segments_BT], axis=1
    )
    y_BTX = x_BTX * kernel_KX[0]
    for k in range(1, P + 1):
        same_BT = segments_BS[:, P - k : P - k + T] == segments_BT
        y_BTX += (
            jnp.where(same_BT.reshape(B, T, *per_channel), all_BSX[:, P - k : P - k + T], 0)
            * kernel_KX[k]
        )
    if every:
        real_BTX = (segments_BT > 0).reshape(B, T, *per_channel)
        return y_BTX, jnp.concatenate([before_BPX, jnp.where(real_BTX, x_BTX, 0)], axis=1)
    # Slot e of `all` holds the first of the P inputs before token e.
    end_B1 = jnp.max(jnp.where(segments_BT > 0, jnp.arange(1, T + 1), 0), axis=1, keepdims=True)
    recent_BP = end_B1 + jnp.arange(P)
    reached_BP = jnp.take_along_axis(segments_BS, recent_BP, axis=1) == jnp.max(
        segments_BT, axis=1, keepdims=True
    )
    recent_BPX = jnp.take_along_axis(all_BSX, recent_BP.reshape(B, P, *per_channel), axis=1)
    return y_BTX, jnp.where(reached_BP.reshape(B, P, *per_channel), recent_BPX, 0)


def uniform_kernel(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws a kernel uniformly from +- K ** -0.5.

    That is PyTorch's default for such a convolution, and so what the papers with one start from.
    """
    return jax.random.uniform(key, shape, dtype, -(shape[0] ** -0.5), shape[0] ** -0.5)


class Canon(nn.Module):
    """x + the convolution of x: a token's neighbours come without attention (arXiv 2512.17351).

    This is Canon-A. With the previous token's content in its own key a token can be found by what
    stands before it, so copying takes one layer of attention instead of two.
    """

    kernel_size: int

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array,
        past_BPD: Array | None = None,
        every: bool = False,
    ) -> tuple[Array, Array]:
        """Returns y_BTD and the last inputs recent_BPD, see `causal_convolution`."""
        kernel_KD = parameter(
            self,
            "taps",
            uniform_kernel,
            (self.kernel_size, x_BTD.shape[-1]),
            (None, "embed"),
            per_channel=True,
        ).astype(x_BTD.dtype)
        y_BTD, recent_BPD = causal_convolution(x_BTD, kernel_KD, segments_BT, past_BPD, every)
        return x_BTD + y_BTD, recent_BPD
