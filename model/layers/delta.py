"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it.

    q, k, v = silu(convolution(W h))
    a = exp(-exp(rate) softplus(W_a h + bias))        b = sigmoid(W_b h)
    out = W_o (norm(o) * silu(W_g h)),    o by the gated delta rule

The delta rule itself is in model/attention/delta_rule.py.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.caches import DeltaCache
from model.attention.delta_rule import chunked_delta, recurrent_delta
from model.attention.reference import IndexerStats
from model.config import ModelConfig
from model.layers.convolution import causal_convolution, uniform_kernel
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.layers.parameter import parameter
from model.segments import TokenInfo
from model.sharding import constrain

UNIT_EPS = 1e-6  # added to the squared length of a query or key, as released
# The step sizes that decays start from: log-uniform between SLOWEST and FASTEST, and at least
# MIN_STEP (the authors' code).
SLOWEST, FASTEST, MIN_STEP = 1e-3, 1e-1, 1e-4


def unit_length(x_BTNH: Array) -> Array:
    """Computes x / |x| in float32."""
    x32 = x_BTNH.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + UNIT_EPS)


def decay_rates(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws logarithms of rates that are uniform in 0 .. 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-2, 16.0))


def decay_biases(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws biases whose softplus is log-uniform between SLOWEST and FASTEST."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(SLOWEST), math.log(FASTEST)))
    step = jnp.maximum(step, MIN_STEP)
    return step + jnp.log(-jnp.expm1(-step))


class GatedDeltaNet(nn.Module):
    """A linear attention with a state of fixed size, beside softmax attention in hybrid models."""

    config: ModelConfig

    def setup(self):
        """Declares the parameters."""
        c, d = self.config, self.config.delta
        init = nn.initializers.normal(c.initializer_range)
        rate = functools.partial(parameter, self, per_channel=True, keep_float32=True)

        def weight(name: str, heads: int, *width: int) -> Array:
            shape, axes = (c.hidden_size, heads, *width), ("embed", "heads", "head_dim")
            return parameter(self, name, init, shape, axes[: len(shape)])

        def kernel(name: str, heads: int, width: int) -> Array:
            shape, axes = (d.conv_kernel_dim, heads, width), (None, "heads", "head_dim")
            return parameter(self, name, uniform_kernel, shape, axes, per_channel=True)

        self.query = weight("query", d.num_key_heads, d.key_head_dim)
        self.query_kernel = kernel("query_taps", d.num_key_heads, d.key_head_dim)
        self.key = weight("key", d.num_key_heads, d.key_head_dim)
        self.key_kernel = kernel("key_taps", d.num_key_heads, d.key_head_dim)
        self.value = weight("value", d.num_value_heads, d.value_head_dim)
        self.value_kernel = kernel("value_taps", d.num_value_heads, d.value_head_dim)
        self.gate = weight("gate", d.num_value_heads, d.value_head_dim)
        self.strength = weight("strength", d.num_value_heads)
        self.decay = weight("decay", d.num_value_heads)
        self.decay_rate = rate("decay_rate", decay_rates, (d.num_value_heads,), ("heads",))
        self.decay_bias = rate("decay_bias", decay_biases, (d.num_value_heads,), ("heads",))
        self.out_norm = RMSNorm(c.rms_norm_eps, axis="head_dim")
        self.out = parameter(
            self,
            "out",
            init,
            (d.num_value_heads, d.value_head_dim, c.hidden_size),
            ("heads", "head_dim", "embed"),
            input_axes=2,
        )

    def __call__(
        self, hidden_BTD: Array, tokens: TokenInfo, past: DeltaCache | None = None
    ) -> tuple[Array, IndexerStats, DeltaCache]:
        """Reads tokens into the state, and the state by them.

        See `LatentAttention.__call__` for the arguments and what is returned. Positions are not
        needed; `past` holds all there is to attend to, so no place is read. Padding leaves the
        state as it is.
        """
        d = self.config.delta
        real_BT1 = (tokens.segments_BT > 0)[..., None]
        past = past or DeltaCache.begin(self.config, hidden_BTD.shape[0])

        def convolved(weight: Array, kernel: Array, recent: Array | None) -> tuple[Array, Array]:
            x_BTNH, recent = causal_convolution(
                linear(hidden_BTD, weight),
                kernel.astype(hidden_BTD.dtype),
                tokens.segments_BT,
                recent,
                tokens.every,
            )
            return constrain(jax.nn.silu(x_BTNH), "batch", "time", "heads", None), recent

        with jax.named_scope("projections"):
            q_BTKH, recent_q = convolved(self.query, self.query_kernel, past.recent_q)
            k_BTKH, recent_k = convolved(self.key, self.key_kernel, past.recent_k)
            v_BTNV, recent_v = convolved(self.value, self.value_kernel, past.recent_v)
            a_BTN = linear(hidden_BTD, self.decay).astype(jnp.float32)
            log_a_BTN = -jnp.exp(self.decay_rate) * jax.nn.softplus(a_BTN + self.decay_bias)
            log_a_BTN = jnp.where(real_BT1, log_a_BTN, 0.0)
            b_BTN = jax.nn.sigmoid(linear(hidden_BTD, self.strength).astype(jnp.float32))
            b_BTN = jnp.where(real_BT1, b_BTN, 0.0)
        with jax.named_scope("delta_rule"):
            group = d.num_value_heads // d.num_key_heads
            q_BTNH, k_BTNH = (
                jnp.repeat(unit_length(x_BTKH), group, axis=2) for x_BTKH in (q_BTKH, k_BTKH)
            )
            q_BTNH, v_BTNV = q_BTNH * d.key_head_dim**-0.5, v_BTNV.astype(jnp.float32)
            inputs = q_BTNH, k_BTNH, v_BTNV, log_a_BTN, b_BTN
            if hidden_BTD.shape[1] == 1 or tokens.every:
                o_BTNV, state_BNHV = recurrent_delta(*inputs, past.state_BNHV, tokens.every)
            else:
                o_BTNV, state_BNHV = chunked_delta(
                    *inputs, tokens.segments_BT, past.state_BNHV, d.chunk_size
                )
        with jax.named_scope("output_projection"):
            dtype = hidden_BTD.dtype
            gate_BTNV = jax.nn.silu(linear(hidden_BTD, self.gate).astype(jnp.float32))
            out_BTNV = (self.out_norm(o_BTNV).astype(dtype) * gate_BTNV).astype(dtype)
            cache = DeltaCache(state_BNHV, recent_q, recent_k, recent_v)
            return linear(out_BTNV, self.out, axes=2), IndexerStats.zero(), cache
