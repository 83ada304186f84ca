"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it: attention whose memory is one matrix a
head, decayed, corrected and read token by token.

    S_t = a_t S_{t-1} + b_t k_t (v_t - (a_t S_{t-1})^T k_t)^T        o_t = S_t^T q_t            (eq.
    10, transposed: S is H x V)

with a decay a_t in (0, 1), a writing strength b_t in (0, 1), and keys of length 1.
`recurrent_delta` is the equation, for decoding; `chunked_delta` is the same in chunks of tokens,
within which it is matmuls (section 3.3), for training and prefill.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.reference import IndexerStats
from model.cache import DeltaCache
from model.config import ModelConfig
from model.layers.convolution import causal_convolution, uniform_taps
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.sharding import constrain, named

UNIT_EPS = 1e-6  # added to the squared length of a query or key, as released
SLOWEST, FASTEST, LEAST_STEP = (
    1e-3,
    1e-1,
    1e-4,
)  # of the step sizes that decays start from (the authors' code)


def unit_length(x_BTNH: Array) -> Array:
    """x / |x| in float32."""
    x32 = x_BTNH.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + UNIT_EPS)


def recurrent_delta(
    q_BTNH: Array, k_BTNH: Array, v_BTNV: Array, log_a_BTN: Array, b_BTN: Array, state_BNHV: Array
) -> tuple[Array, Array]:
    """The equation, token by token. Returns o_BTNV and the state after the last token; all float32.

    Args:
      q_BTNH, k_BTNH: of unit length, q scaled.
      log_a_BTN: logarithm of the decay, at most 0.
    """

    def step(state_BNHV, token):
        q_BNH, k_BNH, v_BNV, log_a_BN, b_BN = token
        state_BNHV = state_BNHV * jnp.exp(log_a_BN)[..., None, None]
        error_BNV = v_BNV - jnp.einsum("BNHV,BNH->BNV", state_BNHV, k_BNH)
        state_BNHV += jnp.einsum("BNH,BNV->BNHV", k_BNH, b_BN[..., None] * error_BNV)
        return state_BNHV, jnp.einsum("BNHV,BNH->BNV", state_BNHV, q_BNH)

    tokens = jax.tree.map(
        lambda x_BT: jnp.moveaxis(x_BT, 1, 0), (q_BTNH, k_BTNH, v_BTNV, log_a_BTN, b_BTN)
    )
    state_BNHV, o_TBNV = jax.lax.scan(step, state_BNHV, tokens)
    return jnp.moveaxis(o_TBNV, 0, 1), state_BNHV


def chunked_delta(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNV: Array,
    log_a_BTN: Array,
    b_BTN: Array,
    segments_BT: Array,
    state_BNHV: Array,
    chunk: int,
) -> tuple[Array, Array]:
    """`recurrent_delta` inside each segment, in chunks of C tokens (arXiv 2412.06464, eq. 17-19, by
    the UT transform of arXiv 2406.06484).

    With g the running sum of log a within a chunk and D[i, j] = exp(g_i - g_j):

        (I + strictly_lower(b_i (k_i . k_j) D[i, j])) [U  W] = [b v   b exp(g) k] V' = U - W S
        O = (exp(g) q) S + lower((q_i . k_j) D[i, j]) V'        S <- exp(g_C) S + (exp(g_C - g) k)^T
        V'

    Tokens of other segments are masked out of D, so packed rows need no resets: nothing is written
    to the state from before the segment that a chunk ends in, and nothing read of it by a segment
    that begins in the chunk. `state_BNHV` belongs to the segment x begins with.

    Returns o_BTNV, zeros for padding, and the state of the last token's segment (zeros if that is
    padding); all float32.
    """
    B, T, N, _ = q_BTNH.shape
    C = min(chunk, T)
    n = -(-T // C)

    def cut(x_BTN: Array) -> Array:
        """[B, T, N, ...] to [n, B, N, C, ...]."""
        x_BTN = jnp.pad(x_BTN, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x_BTN.ndim - 2))
        return jnp.moveaxis(x_BTN.reshape(B, n, C, *x_BTN.shape[2:]), (1, 3), (0, 2))

    # Padding that fills the last chunk counts as more of the last segment, writes nothing and does
    # not decay: so the state stays that of the last token.
    segments_nBC = jnp.swapaxes(
        jnp.pad(segments_BT, [(0, 0), (0, n * C - T)], mode="edge").reshape(B, n, C), 0, 1
    )
    b_BTN = jnp.where((segments_BT > 0)[..., None], b_BTN, 0.0)
    before_nB = jnp.concatenate([segments_BT[None, :, 0], segments_nBC[:-1, :, -1]])

    def step(state_BNHV, piece):
        q_BNCH, k_BNCH, v_BNCV, log_a_BNC, b_BNC, segments_BC, before_B = piece
        g_BNC = jnp.cumsum(log_a_BNC, axis=-1)
        among_BCC = (segments_BC[:, :, None] == segments_BC[:, None]) & jnp.tri(C, dtype=bool)
        decay_BNCC = jnp.exp(
            jnp.where(among_BCC[:, None], g_BNC[..., None] - g_BNC[..., None, :], -jnp.inf)
        )
        since_BNC1 = jnp.where((segments_BC == before_B[:, None])[:, None], jnp.exp(g_BNC), 0.0)[
            ..., None
        ]  # of the state before the chunk
        until_BNC1 = jnp.where(
            (segments_BC == segments_BC[:, -1:])[:, None], jnp.exp(g_BNC[..., -1:] - g_BNC), 0.0
        )[..., None]  # at its end

        keys_BNCC = jnp.einsum("BNCH,BNSH->BNCS", k_BNCH, k_BNCH) * decay_BNCC
        system_BNCC = jnp.tril(keys_BNCC * b_BNC[..., None], -1) + jnp.eye(C)
        sources = jnp.concatenate(
            [b_BNC[..., None] * v_BNCV, b_BNC[..., None] * since_BNC1 * k_BNCH], axis=-1
        )
        u_BNCV, w_BNCH = jnp.split(
            jax.scipy.linalg.solve_triangular(system_BNCC, sources, lower=True, unit_diagonal=True),
            [v_BNCV.shape[-1]],
            axis=-1,
        )
        new_BNCV = u_BNCV - w_BNCH @ state_BNHV
        o_BNCV = (q_BNCH * since_BNC1) @ state_BNHV + (
            jnp.einsum("BNCH,BNSH->BNCS", q_BNCH, k_BNCH) * decay_BNCC
        ) @ new_BNCV
        state_BNHV = since_BNC1[:, :, -1:] * state_BNHV + jnp.einsum(
            "BNCH,BNCV->BNHV", k_BNCH * until_BNC1, new_BNCV
        )
        return state_BNHV, o_BNCV

    pieces = (
        cut(q_BTNH),
        cut(k_BTNH),
        cut(v_BTNV),
        cut(log_a_BTN),
        cut(b_BTN),
        segments_nBC,
        before_nB,
    )
    state_BNHV, o_nBNCV = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state_BNHV, pieces)
    o_BTNV = jnp.moveaxis(o_nBNCV, (0, 3), (1, 2)).reshape(B, n * C, N, -1)[:, :T]
    return jnp.where((segments_BT > 0)[..., None, None], o_BTNV, 0.0), state_BNHV


def decay_rates(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Logarithms of rates uniform in 0 .. 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-2, 16.0))


def decay_biases(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """softplus of it is log-uniform between SLOWEST and FASTEST."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(SLOWEST), math.log(FASTEST)))
    step = jnp.maximum(step, LEAST_STEP)
    return step + jnp.log(-jnp.expm1(-step))


class GatedDeltaNet(nn.Module):
    """q, k, v = silu(convolution(W h)); a = exp(-exp(rate) softplus(W_a h + bias)); b = sigmoid(W_b
    h); out = W_o (norm(o) * silu(W_g h)).
    """

    config: ModelConfig

    def setup(self):
        c, d = self.config, self.config.delta
        init = nn.initializers.normal(c.initializer_range)

        def weight(name, heads, *width):
            return self.param(
                name,
                named(init, ("width", "heads", "head_width")[: 2 + len(width)]),
                (c.hidden_size, heads, *width),
                jnp.float32,
            )

        def taps(name, heads, width):
            return self.param(
                name,
                named(uniform_taps, (None, "heads", "head_width")),
                (d.conv_kernel_dim, heads, width),
                jnp.float32,
            )

        self.query, self.query_taps = (
            weight("query", d.num_key_heads, d.key_head_dim),
            taps("query_taps", d.num_key_heads, d.key_head_dim),
        )
        self.key, self.key_taps = (
            weight("key", d.num_key_heads, d.key_head_dim),
            taps("key_taps", d.num_key_heads, d.key_head_dim),
        )
        self.value, self.value_taps = (
            weight("value", d.num_value_heads, d.value_head_dim),
            taps("value_taps", d.num_value_heads, d.value_head_dim),
        )
        self.gate = weight("gate", d.num_value_heads, d.value_head_dim)
        self.strength = weight("strength", d.num_value_heads)
        self.decay = weight("decay", d.num_value_heads)
        self.decay_rate = self.param(
            "decay_rate", named(decay_rates, ("heads",)), (d.num_value_heads,), jnp.float32
        )
        self.decay_bias = self.param(
            "decay_bias", named(decay_biases, ("heads",)), (d.num_value_heads,), jnp.float32
        )
        self.out_norm = RMSNorm(c.rms_norm_eps, axis="head_width")
        self.out = self.param(
            "out",
            named(init, ("heads", "head_width", "width")),
            (d.num_value_heads, d.value_head_dim, c.hidden_size),
            jnp.float32,
        )

    def __call__(
        self,
        hidden_BTD: Array,
        positions_BT: Array,
        segments_BT: Array,
        stage: str,
        past: DeltaCache | None = None,
        allowed_BTS: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, IndexerStats, DeltaCache]:
        """As LatentAttention's. It needs no positions; `past` holds all there is to attend to, so
        of `allowed_BTS` and `at` nothing is read.
        """
        d = self.config.delta
        past = past or DeltaCache(
            jnp.zeros(
                (hidden_BTD.shape[0], d.num_value_heads, d.key_head_dim, d.value_head_dim),
                jnp.float32,
            ),
            None,
            None,
            None,
        )

        def convolved(weight, taps, recent):
            x_BTNH, recent = causal_convolution(
                linear(hidden_BTD, weight), taps.astype(hidden_BTD.dtype), segments_BT, recent
            )
            return constrain(jax.nn.silu(x_BTNH), "batch", "time", "heads", None), recent

        with jax.named_scope("projections"):
            q_BTKH, recent_q = convolved(self.query, self.query_taps, past.recent_q)
            k_BTKH, recent_k = convolved(self.key, self.key_taps, past.recent_k)
            v_BTNV, recent_v = convolved(self.value, self.value_taps, past.recent_v)
            a_BTN = linear(hidden_BTD, self.decay).astype(jnp.float32)
            log_a_BTN = -jnp.exp(self.decay_rate) * jax.nn.softplus(a_BTN + self.decay_bias)
            b_BTN = jax.nn.sigmoid(linear(hidden_BTD, self.strength).astype(jnp.float32))
        with jax.named_scope("delta_rule"):
            q_BTNH, k_BTNH = (
                jnp.repeat(unit_length(x_BTKH), d.num_value_heads // d.num_key_heads, axis=2)
                for x_BTKH in (q_BTKH, k_BTKH)
            )
            inputs = (
                q_BTNH * d.key_head_dim**-0.5,
                k_BTNH,
                v_BTNV.astype(jnp.float32),
                log_a_BTN,
                b_BTN,
            )
            if hidden_BTD.shape[1] == 1:
                o_BTNV, state_BNHV = recurrent_delta(*inputs, past.state_BNHV)
            else:
                o_BTNV, state_BNHV = chunked_delta(
                    *inputs, segments_BT, past.state_BNHV, d.chunk_size
                )
        with jax.named_scope("output_projection"):
            gate_BTNV = jax.nn.silu(linear(hidden_BTD, self.gate).astype(jnp.float32))
            out_BTNV = (self.out_norm(o_BTNV).astype(hidden_BTD.dtype) * gate_BTNV).astype(
                hidden_BTD.dtype
            )
            return (
                linear(out_BTNV, self.out, axes=2),
                IndexerStats.zero(),
                DeltaCache(state_BNHV, recent_q, recent_k, recent_v),
            )
