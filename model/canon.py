"""A short causal convolution over time: what a token has just behind it, without attention having to fetch it (Canon-A, arXiv 2512.17351)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.sharding import named


class Canon(nn.Module):
    """y[t] = x[t] + sum over k < taps of w[k] * x[t - k], channel by channel, inside each segment.

    With the previous token's content in its own key a token can be found by what stands before it, so copying takes one layer of attention where it took two.
    The taps start uniform in +-taps ** -0.5, as the paper's do (PyTorch's default for such a convolution).
    """

    taps: int

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array, past_BKD: Array | None = None) -> tuple[Array, Array]:
        """Returns y_BTD and the recent inputs [B, taps - 1, D]: what the tokens after these need, zeros where the last token's segment does not reach.

        Args:
          past_BKD: the recent inputs before x, of the same segment. Without them x is where its segments begin.
        """
        (B, T, D), K = x_BTD.shape, self.taps - 1
        bound = self.taps**-0.5
        init = named(lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound), (None, "width"))
        weight_KD = self.param("taps", init, (self.taps, D), jnp.float32).astype(x_BTD.dtype)
        before_BKD = jnp.zeros((B, K, D), x_BTD.dtype) if past_BKD is None else past_BKD.astype(x_BTD.dtype)
        all_BSD = jnp.concatenate([before_BKD, x_BTD], axis=1)
        segments_BS = jnp.concatenate([jnp.broadcast_to(segments_BT[:, :1], (B, K)), segments_BT], axis=1)
        y_BTD = x_BTD * (1 + weight_KD[0])
        for k in range(1, self.taps):
            same_BT1 = (segments_BS[:, K - k : K - k + T] == segments_BT)[..., None]
            y_BTD += jnp.where(same_BT1, all_BSD[:, K - k : K - k + T], 0) * weight_KD[k]
        return y_BTD, jnp.where((segments_BS[:, T:] == segments_BT[:, -1:])[..., None], all_BSD[:, T:], 0)
