"""The gated delta rule (arXiv 2412.06464): attention whose memory is one matrix a head.

The matrix is decayed, corrected and read token by token (eq. 10, transposed: S is H x V):

    S_t = a_t S_{t-1} + b_t k_t (v_t - (a_t S_{t-1})^T k_t)^T        o_t = S_t^T q_t

with a decay a_t in (0, 1), a writing strength b_t in (0, 1), and keys of length 1.
`recurrent_delta` is the equation, for decoding; `chunked_delta` is the same in chunks of tokens,
within which it is matmuls (section 3.3), for training and prefill.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.chunks import cut_chunks, join_chunks


class DeltaChunk(NamedTuple):
    """The inputs of a chunk of C tokens.

    q_BNCH, k_BNCH, v_BNCV: queries, keys and values; V is a value's width.
    log_a_BNC, b_BNC: the logarithm of the decay, and the writing strength.
    segments_BC: the segment of each token.
    before_B: the segment of the token before the chunk, whose state it begins with.
    """

    q_BNCH: Array
    k_BNCH: Array
    v_BNCV: Array
    log_a_BNC: Array
    b_BNC: Array
    segments_BC: Array
    before_B: Array


def recurrent_delta(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNV: Array,
    log_a_BTN: Array,
    b_BTN: Array,
    state_BNHV: Array,
    every: bool = False,
) -> tuple[Array, Array]:
    """Computes the equation token by token.

    Args:
      q_BTNH, k_BTNH: queries, scaled, and keys, of unit length.
      v_BTNV: values, V wide.
      log_a_BTN: the logarithm of the decay, at most 0.
      b_BTN: the writing strength.
      state_BNHV: the state before the first token.
      every: returns the state before the first token and after each, [B, T + 1, N, H, V], in place
        of the one after the last.

    Returns: o_BTNV and the state after the last token; all float32.
    """

    def step(state_BNHV, token):
        q_BNH, k_BNH, v_BNV, log_a_BN, b_BN = token
        state_BNHV = state_BNHV * jnp.exp(log_a_BN)[..., None, None]
        error_BNV = v_BNV - jnp.einsum("BNHV,BNH->BNV", state_BNHV, k_BNH)
        state_BNHV += jnp.einsum("BNH,BNV->BNHV", k_BNH, b_BN[..., None] * error_BNV)
        o_BNV = jnp.einsum("BNHV,BNH->BNV", state_BNHV, q_BNH)
        return state_BNHV, (o_BNV, state_BNHV if every else None)

    tokens = jax.tree.map(
        lambda x_BT: jnp.moveaxis(x_BT, 1, 0), (q_BTNH, k_BTNH, v_BTNV, log_a_BTN, b_BTN)
    )
    last_BNHV, (o_TBNV, states_TBNHV) = jax.lax.scan(step, state_BNHV, tokens)
    if states_TBNHV is not None:
        states_SBNHV = jnp.concatenate([state_BNHV[None], states_TBNHV])
        return jnp.moveaxis(o_TBNV, 0, 1), jnp.moveaxis(states_SBNHV, 0, 1)
    return jnp.moveaxis(o_TBNV, 0, 1), last_BNHV


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
    """Computes `recurrent_delta` inside each segment, in chunks of tokens, see `delta_chunk`.

    Args:
      q_BTNH, k_BTNH, v_BTNV, log_a_BTN, b_BTN: see `recurrent_delta`; both of the latter are 0 for
        padding, which then neither decays the state nor writes to it.
      segments_BT: the segment of each token, ascending; 0 is padding.
      state_BNHV: the state before the first token, of the segment it is in.
      chunk: C, tokens of a chunk.

    Returns: o_BTNV, zeros for padding, and the state after the last token; all float32.
    """
    T = q_BTNH.shape[1]
    C = min(chunk, T)

    def cut(x_BTN: Array) -> Array:
        """Cuts [B, T, N, ...] into [n, B, N, C, ...]."""
        return jnp.swapaxes(cut_chunks(x_BTN, C), 2, 3)

    # Padding counts as more of the segment before it: so the state stays that of the last token.
    filled_BT = jax.lax.cummax(segments_BT, axis=1)
    segments_nBC = cut_chunks(jnp.pad(filled_BT, [(0, 0), (0, -T % C)], mode="edge"), C)
    before_nB = jnp.concatenate([filled_BT[None, :, 0], segments_nBC[:-1, :, -1]])
    chunks = DeltaChunk(
        cut(q_BTNH), cut(k_BTNH), cut(v_BTNV), cut(log_a_BTN), cut(b_BTN), segments_nBC, before_nB
    )
    step = jax.checkpoint(delta_chunk, prevent_cse=False)
    state_BNHV, o_nBNCV = jax.lax.scan(step, state_BNHV, chunks)
    o_BTNV = join_chunks(jnp.swapaxes(o_nBNCV, 2, 3), T)
    return jnp.where((segments_BT > 0)[..., None, None], o_BTNV, 0.0), state_BNHV


def delta_chunk(state_BNHV: Array, chunk: DeltaChunk) -> tuple[Array, Array]:
    """Computes a chunk of C tokens by matmuls (arXiv 2412.06464, eq. 17-19).

    This is the UT transform of arXiv 2406.06484. With g the running sum of log a within the chunk
    and D[i, j] = exp(g_i - g_j):

        (I + strictly_lower(b_i (k_i . k_j) D[i, j])) [U  W] = [b v   b exp(g) k]
        V' = U - W S
        O = (exp(g) q) S + lower((q_i . k_j) D[i, j]) V'
        S <- exp(g_C) S + (exp(g_C - g) k)^T V'

    Tokens of other segments are masked out of D, so packed rows need no resets: nothing is written
    to the state from before the segment that a chunk ends in, and nothing read of it by a segment
    that begins in the chunk.

    Returns the state after the chunk, and o_BNCV.
    """
    q_BNCH, k_BNCH, v_BNCV, log_a_BNC, b_BNC, segments_BC, before_B = chunk
    C = segments_BC.shape[1]
    g_BNC = jnp.cumsum(log_a_BNC, axis=-1)
    allowed_BCC = (segments_BC[:, :, None] == segments_BC[:, None]) & jnp.tri(C, dtype=bool)
    decay_BNCC = jnp.exp(
        jnp.where(allowed_BCC[:, None], g_BNC[..., None] - g_BNC[..., None, :], -jnp.inf)
    )
    # What is left, at a token, of the state before the chunk; and at the chunk's end, of a token.
    continues_BC, reaches_BC = segments_BC == before_B[:, None], segments_BC == segments_BC[:, -1:]
    since_BNC1 = jnp.where(continues_BC[:, None], jnp.exp(g_BNC), 0.0)[..., None]
    until_BNC1 = jnp.where(reaches_BC[:, None], jnp.exp(g_BNC[..., -1:] - g_BNC), 0.0)[..., None]

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
