"""Attention over selected keys on an NVIDIA Hopper GPU, forward and backward.

This is the row "gpu" of the table in kernels/sparse_attention.py, which defines the operation.
Three kernels run on the pipeline of kernels/hopper_pipeline.py, each over blocks of 128 rows:

    kernel                  resident               streamed               sums over
    sparse_attention        q                      k, v                   keys
    sparse_attention_dq     q, dout, lse, delta    k, v                   keys
    sparse_attention_dkv    k, v                   q, dout, lse, delta    queries

The backward pass computes the probabilities again from `lse` (arXiv 2205.14135), in two kernels,
one that sums over keys and one over queries: no atomics, so the same inputs give the same bits.
Products are wgmma, with the probabilities as left operand straight from registers.

A kernel reads the bitmask with 32 columns of a row in one word and the words of neighbouring rows
next to each other, so that a thread reads the few words of its two rows and nothing else:
kernels/bitmask.py rearranges it, along keys or along queries.

The kernels have never run on a GPU so far: an interpreter and NVIDIA's compiler check them
(docs/gpu.md).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.bitmask import BITS, along_keys, along_queries
from kernels.hopper_memory import BLOCK, ROWS, Operands, Result
from kernels.hopper_pipeline import FoldTiles, add_dot, dot_transposed, run_pipeline
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, padded

# Columns of 16 bits in the 128 bytes of a swizzle: head widths are padded to multiples of it.
SWIZZLE_COLUMNS = 64
LOG2E = math.log2(math.e)  # the hardware's exponential is of base 2


class Tiles(NamedTuple):
    """Sizes of the tiles: the rows of the other side that each has, 64 or 128."""

    forward: int = 128  # keys
    backward: int = 64  # keys (dq) or queries (dk and dv)
    interpret: Any = None


def attend_gpu(
    q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, tiles: Tiles = Tiles()
) -> tuple[Array, Array]:
    """Attends to the selected keys by the GPU's kernels.

        out = softmax(q k^T over the selected keys) v        lse = log of its denominator

    Args:
      q_BNTH, k_BNSH, v_BNSV: heads first; q is scaled; bfloat16 or float16 (interpreted, float32
        too). Widths are padded to multiples of 64; widths H of keys and V of values have room for
        3 H + 2 V <= 880: keys of 192 with values of 128, 128 with 192, 64 with 320, but no 192 with
        192.
      bits_BTW: each query's keys, see kernels/bitmask.py.
      tiles: the sizes of tiles.

    Returns:
      out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.

    Raises TypeError for another dtype: wgmma multiplies no float32. Raises UserError for wider
    heads.
    """
    return _attend(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, tiles: Tiles
) -> tuple[Array, Array]:
    return _forward(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)[0]


def _forward(q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, tiles: Tiles):
    """Returns (out_BNTV, lse_BNT), and what the backward pass needs."""
    T, V = q_BNTH.shape[2], v_BNSV.shape[3]
    q, k, v = (
        _whole_blocks(name, x, tiles) for name, x in (("q", q_BNTH), ("k", k_BNSH), ("v", v_BNSV))
    )
    out, lse = run_pipeline(
        functools.partial(
            forward_rows, tile=tiles.forward, value_width=v.shape[3], interpret=tiles.interpret
        ),
        "sparse_attention",
        Operands([q], [k, v], [], words_BwR=along_keys(padded(bits_BTW, 1, q.shape[2]))),
        [Result(streamed=1), Result()],
        tile=tiles.forward,
        interpret=tiles.interpret,
    )
    out_BNTV, lse_BNT = out[:, :, :T, :V], lse[:, :, :T]
    return (out_BNTV, lse_BNT), (q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT)


def _backward(tiles: Tiles, saved: tuple[Array, ...], cotangents: tuple[Array, Array]):
    """Returns the gradients to q, k and v."""
    q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT = saved
    dout_BNTV, dlse_BNT = cotangents
    (T, H), (S, V) = q_BNTH.shape[2:], v_BNSV.shape[2:]
    delta_BNT = jnp.sum(out_BNTV.astype(F32) * dout_BNTV.astype(F32), axis=-1) - dlse_BNT
    q, k, v, dout, lse, delta = (
        _whole_blocks(name, x, tiles)
        for name, x in (
            ("q", q_BNTH),
            ("k", k_BNSH),
            ("v", v_BNSV),
            ("dout", dout_BNTV),
            ("lse", lse_BNT * LOG2E),
            ("delta", delta_BNT),
        )
    )
    bits_BTW = padded(bits_BTW, 1, q.shape[2])
    words_BwT, words_BwS = along_keys(bits_BTW), along_queries(bits_BTW)[..., : k.shape[2]]
    run = functools.partial(run_pipeline, tile=tiles.backward, interpret=tiles.interpret)
    (dq,) = run(
        functools.partial(dq_rows, tile=tiles.backward, interpret=tiles.interpret),
        "sparse_attention_dq",
        Operands([q, dout, lse, delta], [k, v], [], words_BwT),
        [Result(resident=0)],
    )
    dk, dv = run(
        functools.partial(dkv_rows, tile=tiles.backward, interpret=tiles.interpret),
        "sparse_attention_dkv",
        Operands([k, v], [q, dout], [lse, delta], words_BwS),
        [Result(resident=0), Result(resident=1)],
    )
    return dq[:, :, :T, :H], dk[:, :, :S, :H], dv[:, :, :S, :V], None


_attend.defvjp(_forward, _backward)


def _whole_blocks(name: str, x: Array, tiles: Tiles) -> Array:
    """Pads rows to a multiple of BLOCK, and a width to a multiple of SWIZZLE_COLUMNS.

    Args:
      name: what the array is, for the error.
      x: [B, N, rows, width] or [B, N, rows].
      tiles: says whether the kernel is interpreted.

    Raises TypeError for matrices that the tensor cores do not take.
    """
    if x.ndim == 4 and not tiles.interpret and x.dtype not in (jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"attend_gpu: {name} is {x.dtype}; the tensor cores take bfloat16 or float16"
        )
    x = padded(x, 2, -(-x.shape[2] // BLOCK) * BLOCK)
    if x.ndim == 3:
        return x
    return padded(x, 3, -(-x.shape[3] // SWIZZLE_COLUMNS) * SWIZZLE_COLUMNS)


def forward_rows(
    resident: list, fold_tiles: FoldTiles, *, tile: int, value_width: int, interpret: Any
) -> tuple[Array, Array]:
    """Computes the output and lse of ROWS queries: a softmax over keys as they arrive.

    Args:
      resident: q [R, H]; R is ROWS here and in the names below.
      fold_tiles: goes over tiles of k [K, H] with the bitmask, and v [K, V].
      tile: K, keys of a tile.
      value_width: V.
      interpret: an interpreter's parameters, or None.

    Returns: out [R, V] float32, and lse [R].
    """
    (q_ref,) = resident

    def step(streamed, carry):
        """Adds a tile of keys to the running maximum, sum and mean of the softmax."""
        (k, v), (mixed_RV, largest_R, total_R) = streamed, carry
        logits_RK = dot_transposed(q_ref, k.wait(), interpret)
        selected_RK = _selected(k.bitmask(), tile)
        k.release(after_register_reads=True)
        logits_RK = lax.select(selected_RK, logits_RK, jnp.full(logits_RK.shape, MASKED, F32))
        before_R, largest_R = largest_R, jnp.maximum(largest_R, jnp.max(logits_RK, axis=1))
        shrink_R = jnp.exp2((before_R - largest_R) * LOG2E)
        p_RK = jnp.exp2(logits_RK * LOG2E - _by_row(largest_R * LOG2E, logits_RK))
        total_R = total_R * shrink_R + jnp.sum(p_RK, axis=1)
        mixed_RV = mixed_RV * _by_row(shrink_R, mixed_RV)
        mixed_RV = add_dot(mixed_RV, p_RK.astype(v.dtype), v.wait(), interpret)
        v.release()
        return mixed_RV, largest_R, total_R

    nothing = (
        jnp.zeros((ROWS, value_width), F32),
        jnp.full((ROWS,), INITIAL_MAX, F32),
        jnp.zeros((ROWS,), F32),
    )
    mixed_RV, largest_R, total_R = fold_tiles(step, nothing)
    has_key_R = total_R > 0
    total_R = jnp.where(has_key_R, total_R, 1.0)
    out_RV = mixed_RV / _by_row(total_R, mixed_RV)
    return out_RV, jnp.where(has_key_R, largest_R + jnp.log(total_R), 0.0)


def dq_rows(resident: list, fold_tiles: FoldTiles, *, tile: int, interpret: Any) -> tuple[Array]:
    """Computes dq of ROWS queries, a sum over keys.

        dlogits = p * (dout v^T - delta)        dq = dlogits k

    Args:
      resident: q [R, H], dout [R, V], lse [R] in base 2 and delta [R].
      fold_tiles: goes over tiles of k [K, H] with the bitmask, and v [K, V].
      tile: K, keys of a tile.
      interpret: an interpreter's parameters, or None.

    Returns: dq [R, H] float32.
    """
    q_ref, dout_ref, lse_ref, delta_ref = resident
    lse_R, delta_R = lse_ref[...], delta_ref[...]

    def step(streamed, dq_RH):
        """Adds to dq the share of a tile of keys."""
        k, v = streamed
        logits_RK = dot_transposed(q_ref, k.wait(), interpret)
        p_RK = _probabilities(logits_RK, _by_row(lse_R, logits_RK), _selected(k.bitmask(), tile))
        dp_RK = dot_transposed(dout_ref, v.wait(), interpret)
        v.release()
        dlogits_RK = p_RK * (dp_RK - _by_row(delta_R, dp_RK))
        dq_RH = add_dot(dq_RH, dlogits_RK.astype(k.dtype), k.matrix, interpret)
        k.release(after_register_reads=True)
        return dq_RH

    return (fold_tiles(step, jnp.zeros(q_ref.shape, F32)),)


def dkv_rows(
    resident: list, fold_tiles: FoldTiles, *, tile: int, interpret: Any
) -> tuple[Array, Array]:
    """Computes dk and dv of ROWS keys, sums over queries.

        dv = p^T dout        dk = dlogits^T q, with dlogits as in `dq_rows`

    Args:
      resident: k [R, H] and v [R, V].
      fold_tiles: goes over tiles of q [Q, H] with lse, delta and the bitmask, and dout [Q, V].
      tile: Q, queries of a tile.
      interpret: an interpreter's parameters, or None.

    Returns: dk [R, H] and dv [R, V], float32.
    """
    k_ref, v_ref = resident
    lse, delta = 0, 1  # of the streamed rows

    def step(streamed, carry):
        """Adds to dk and dv the share of a tile of queries."""
        (q, dout), (dk_RH, dv_RV) = streamed, carry
        logits_RQ = dot_transposed(k_ref, q.wait(), interpret)
        lse_RQ = _by_column(q.row(lse), logits_RQ)
        p_RQ = _probabilities(logits_RQ, lse_RQ, _selected(q.bitmask(), tile))
        # Both uses take it rounded, two to a register: registers are short here.
        p_RQ = lax.optimization_barrier(p_RQ.astype(dout.dtype))
        dp_RQ = dot_transposed(v_ref, dout.wait(), interpret)
        dv_RV = add_dot(dv_RV, p_RQ, dout.matrix, interpret)
        dout.release()
        dlogits_RQ = p_RQ.astype(F32) * (dp_RQ - _by_column(q.row(delta), dp_RQ))
        dk_RH = add_dot(dk_RH, dlogits_RQ.astype(q.dtype), q.matrix, interpret)
        q.release(after_register_reads=True)
        return dk_RH, dv_RV

    return fold_tiles(step, (jnp.zeros(k_ref.shape, F32), jnp.zeros(v_ref.shape, F32)))


def _probabilities(logits: Array, lse: Array, selected: Array) -> Array:
    """Computes the probabilities again: from logits, and from lse in base 2, of their shape."""
    exponent = lax.select(selected, logits * LOG2E - lse, jnp.full(logits.shape, MASKED, F32))
    return jnp.exp2(exponent)


def _selected(words_R: list[Array], columns: int) -> Array:
    """Unpacks the bitmask to bool [ROWS, columns]; `words_R` has a word for each 32 columns."""
    shape = (ROWS, columns)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    words = [lax.broadcast_in_dim(word_R, shape, (0,)) for word_R in words_R]
    word = words[-1]
    for index in reversed(range(len(words) - 1)):
        word = lax.select(column < BITS * (index + 1), words[index], word)
    # The compiler knows which columns a thread has, except for the last three bits of their number:
    # those are shifted away, once for each word, and the rest is a constant.
    bit = lax.shift_left(jnp.full(shape, 1, jnp.int32), column & (BITS - 8))
    return (lax.shift_right_logical(word, column & 7) & bit) != 0


def _by_row(x_R: Array, like: Array) -> Array:
    """Repeats a number for each row over the columns of `like`."""
    return lax.broadcast_in_dim(x_R, like.shape, (0,))


def _by_column(x_K: Array, like: Array) -> Array:
    """Repeats a number for each column over the rows of `like`."""
    return lax.broadcast_in_dim(x_K, like.shape, (1,))
