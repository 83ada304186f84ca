"""Short causal convolutions over time, channel by channel, inside each segment."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.sharding import named


def causal_convolution(
    x_BTX: Array, taps_KX: Array, segments_BT: Array, past_BKX: Array | None
) -> tuple[Array, Array]:
    """y[t] = sum over k < K of taps[k] * x[t - k], as far back as the segment reaches.

    Args:
      x_BTX: any axes of channels X after the first two.
      taps_KX: the K taps of each channel, that of the token itself first.
      past_BKX: the K - 1 inputs before x, of the segment x begins with. Without them x is where its
        segments begin.

    Returns:
      y_BTX, and the last K - 1 inputs [B, K - 1, *X]: what the tokens after these need, zeros where
      the last token's segment does not reach.
    """
    (B, T, *X), K = x_BTX.shape, taps_KX.shape[0] - 1
    per_channel = (1,) * len(X)
    before_BKX = (
        jnp.zeros((B, K, *X), x_BTX.dtype) if past_BKX is None else past_BKX.astype(x_BTX.dtype)
    )
    all_BSX = jnp.concatenate([before_BKX, x_BTX], axis=1)
    segments_BS = jnp.concatenate(
        [jnp.broadcast_to(segments_BT[:, :1], (B, K)), segments_BT], axis=1
    )
    y_BTX = x_BTX * taps_KX[0]
    for k in range(1, K + 1):
        same_BT = segments_BS[:, K - k : K - k + T] == segments_BT
        y_BTX += (
            jnp.where(same_BT.reshape(B, T, *per_channel), all_BSX[:, K - k : K - k + T], 0)
            * taps_KX[k]
        )
    reached_BK = segments_BS[:, T:] == segments_BT[:, -1:]
    return y_BTX, jnp.where(reached_BK.reshape(B, K, *per_channel), all_BSX[:, T:], 0)


def uniform_taps(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Uniform in +- taps ** -0.5: PyTorch's default for such a convolution, and so what the papers
    with one start from.
    """
    return jax.random.uniform(key, shape, dtype, -(shape[0] ** -0.5), shape[0] ** -0.5)


class Canon(nn.Module):
    """x + the convolution of x: what a token has just behind it, without attention having to fetch
    it (Canon-A, arXiv 2512.17351).

    With the previous token's content in its own key a token can be found by what stands before it,
    so copying takes one layer of attention where it took two.
    """

    taps: int

    @nn.compact
    def __call__(
        self, x_BTD: Array, segments_BT: Array, past_BKD: Array | None = None
    ) -> tuple[Array, Array]:
        """Returns y_BTD and the recent inputs [B, taps - 1, D], see `causal_convolution`."""
        taps_KD = self.param(
            "taps", named(uniform_taps, (None, "width")), (self.taps, x_BTD.shape[-1]), jnp.float32
        ).astype(x_BTD.dtype)
        y_BTD, recent_BKD = causal_convolution(x_BTD, taps_KD, segments_BT, past_BKD)
        return x_BTD + y_BTD, recent_BKD
