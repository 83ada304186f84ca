"""Attention over chosen keys as flash attention: masked by a bit a key, and a tile without any chosen key is neither fetched nor computed, forward or backward.

    out = softmax(q k^T over the chosen keys) v            lse = log of its denominator

Of the softmax the backward pass needs one number a query and head, `lse`: the probabilities are computed again from it, tile by tile (arXiv 2205.14135). All
heads choose the same keys (DeepSeek sparse attention, arXiv 2512.02556), so a tile's bits are unpacked once for the heads of a program. Sums are added in a
fixed order: the same inputs give the same bits.

| implementation | how |
|---|---|
| reference | a chunk of queries at a time, over all keys |
| tpu | Pallas: a forward kernel, and two backward, one that sums over keys (dq) and one over queries (dk, dv) |
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.indexer import MASKED
from model.kernels.keyset import KEYS, LANES, held_tiles, next_held, tile_bias, unpack
from model.kernels.tile import F32, NO_KEY, column, dot, padded


class Tiles(NamedTuple):
    """How the work is cut: queries and keys of a tile (multiples of 128; keys divide 4096), and heads of a program."""

    queries: int = 512
    keys: int = 512
    heads: int = 2
    interpret: Any = False


def attend_reference(q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, *, queries: int = 256) -> tuple[Array, Array]:
    """See `attend_tpu`. A chunk's logits [B, N, C, S] are the largest array, in the backward pass too."""
    B, N, T, _ = q_BNTH.shape
    chunk = min(queries, T)
    padded = -(-T // chunk) * chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(q_BNCH, bits_BCW):
        among_B1CS = unpack(bits_BCW, k_BNSH.shape[2])[:, None]
        logits_BNCS = jnp.where(among_B1CS, jnp.einsum("BNCH,BNSH->BNCS", q_BNCH, k_BNSH, preferred_element_type=F32), MASKED)
        largest_BNC1 = lax.stop_gradient(jnp.maximum(jnp.max(logits_BNCS, axis=-1, keepdims=True), NO_KEY))
        p_BNCS = jnp.exp(logits_BNCS - largest_BNC1)
        some_BNC1 = jnp.any(among_B1CS, axis=-1, keepdims=True)
        total_BNC1 = jnp.where(some_BNC1, jnp.sum(p_BNCS, axis=-1, keepdims=True), 1.0)
        out_BNCV = jnp.einsum("BNCS,BNSV->BNCV", p_BNCS.astype(v_BNSV.dtype), v_BNSV, preferred_element_type=F32) / total_BNC1
        lse_BNC1 = jnp.where(some_BNC1, largest_BNC1 + jnp.log(total_BNC1), 0.0)
        return out_BNCV.astype(v_BNSV.dtype), lse_BNC1[..., 0]

    q_nBNCH = jnp.moveaxis(jnp.pad(q_BNTH, [(0, 0), (0, 0), (0, padded - T), (0, 0)]).reshape(B, N, -1, chunk, q_BNTH.shape[3]), 2, 0)
    bits_nBCW = jnp.moveaxis(jnp.pad(bits_BTW, [(0, 0), (0, padded - T), (0, 0)]).reshape(B, -1, chunk, bits_BTW.shape[2]), 1, 0)
    out_nBNCV, lse_nBNC = lax.map(lambda piece: step(*piece), (q_nBNCH, bits_nBCW))
    return jnp.moveaxis(out_nBNCV, 0, 2).reshape(B, N, padded, -1)[:, :, :T], jnp.moveaxis(lse_nBNC, 0, 2).reshape(B, N, padded)[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_tpu(q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, tiles: Tiles = Tiles()) -> tuple[Array, Array]:
    """The kernels.

    Args:
      q_BNTH, k_BNSH, v_BNSV: heads first; q scaled. Any widths.
      bits_BTW: each query's keys, see model/kernels/keyset.py.

    Returns:
      out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.
    """
    return _forward(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)[0]


def _forward_kernel(held_ref, fetch_ref, q_ref, k_ref, v_ref, bits_ref, out_ref, lse_ref, largest_ref, total_ref, mixed_ref):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, keys = q_ref.shape[1], k_ref.shape[2]

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, NO_KEY, F32)
        total_ref[...] = jnp.zeros(total_ref.shape, F32)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        bias_QK = tile_bias(bits_ref[0], j, keys)
        for head in range(heads):
            logits_QK = dot(q_ref[0, head], k_ref[0, head], (1, 1)) + bias_QK
            before_QL = largest_ref[head]
            largest_QL = jnp.maximum(before_QL, jnp.max(logits_QK, axis=1, keepdims=True))
            p_QK = jnp.exp(logits_QK - largest_QL[:, :1])
            shrink_QL = jnp.exp(before_QL - largest_QL)
            total_ref[head] = shrink_QL * total_ref[head] + jnp.sum(p_QK, axis=1, keepdims=True)
            mixed_ref[head] = mixed_ref[head] * shrink_QL[:, :1] + dot(p_QK.astype(v_ref.dtype), v_ref[0, head], (1, 0))
            largest_ref[head] = largest_QL

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for head in range(heads):
            some_QL = total_ref[head] > 0
            total_QL = jnp.where(some_QL, total_ref[head], 1.0)
            out_ref[0, head] = (mixed_ref[head] / total_QL[:, :1]).astype(out_ref.dtype)
            lse_ref[0, head] = jnp.where(some_QL, largest_ref[head] + jnp.log(total_QL), 0.0).T[:1]


def _dq_kernel(held_ref, fetch_ref, q_ref, k_ref, v_ref, bits_ref, lse_ref, delta_ref, dout_ref, dq_ref, sum_ref):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, keys = q_ref.shape[1], k_ref.shape[2]

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        bias_QK = tile_bias(bits_ref[0], j, keys)
        for head in range(heads):
            p_QK = jnp.exp(dot(q_ref[0, head], k_ref[0, head], (1, 1)) + bias_QK - column(lse_ref[0, head]))
            dlogits_QK = p_QK * (dot(dout_ref[0, head], v_ref[0, head], (1, 1)) - column(delta_ref[0, head]))
            sum_ref[head] += dot(dlogits_QK.astype(k_ref.dtype), k_ref[0, head], (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_ref[0] = sum_ref[...].astype(dq_ref.dtype)


def _dkv_kernel(held_ref, fetch_ref, q_ref, k_ref, v_ref, bits_ref, lse_ref, delta_ref, dout_ref, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref):
    """Keys along the rows: so a query's `lse` and `delta` lie along lanes, as they are stored."""
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, keys = q_ref.shape[1], k_ref.shape[2]

    @pl.when(i == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, F32)
        dv_sum_ref[...] = jnp.zeros(dv_sum_ref.shape, F32)

    @pl.when(held_ref[b, j, i] != 0)
    def _():
        bias_KQ = tile_bias(bits_ref[0], j, keys).T
        for head in range(heads):
            p_KQ = jnp.exp(dot(k_ref[0, head], q_ref[0, head], (1, 1)) + bias_KQ - lse_ref[0, head])
            dv_sum_ref[head] += dot(p_KQ.astype(dout_ref.dtype), dout_ref[0, head], (1, 0))
            dlogits_KQ = p_KQ * (dot(v_ref[0, head], dout_ref[0, head], (1, 1)) - delta_ref[0, head])
            dk_sum_ref[head] += dot(dlogits_KQ.astype(q_ref.dtype), q_ref[0, head], (1, 0))

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)


class Operand(NamedTuple):
    """An array (or the shape of a result), the block of it that a program sees, and which: (b, n, i, j) -> index, j a tile of keys."""

    array: Any
    block: tuple[int, ...]
    index: Callable[..., tuple]


def _operands(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles: Tiles) -> list[Operand]:
    T, S = (-(-size // block) * block for size, block in ((q_BNTH.shape[2], tiles.queries), (k_BNSH.shape[2], tiles.keys)))
    heads, of_word = min(tiles.heads, q_BNTH.shape[1]), KEYS // tiles.keys
    return [
        Operand(padded(q_BNTH, 2, T), (1, heads, tiles.queries, q_BNTH.shape[3]), lambda b, n, i, j: (b, n, i, 0)),
        Operand(padded(k_BNSH, 2, S), (1, heads, tiles.keys, k_BNSH.shape[3]), lambda b, n, i, j: (b, n, j, 0)),
        Operand(padded(v_BNSV, 2, S), (1, heads, tiles.keys, v_BNSV.shape[3]), lambda b, n, i, j: (b, n, j, 0)),
        Operand(padded(bits_BTW, 1, T), (1, tiles.queries, LANES), lambda b, n, i, j: (b, i, lax.div(j, of_word))),
    ]


def _call(kernel, name: str, operands: Sequence[Operand], results: Sequence[Operand], scratch, tiles: Tiles, *, by_key: bool = False):
    """Runs a kernel over (b, heads, tiles of queries, tiles of keys), the last in order; `by_key` turns the two round."""
    q, k, _, bits = operands[:4]
    held_Bnm = held_tiles(bits.array, tiles.queries, tiles.keys)[..., : k.array.shape[2] // tiles.keys]
    if by_key:
        held_Bnm = jnp.swapaxes(held_Bnm, 1, 2)

    def spec(operand: Operand) -> pl.BlockSpec:
        def index(b, n, outer, inner, held_ref, fetch_ref):
            fetched = fetch_ref[b, outer, inner]
            return operand.index(b, n, fetched, outer) if by_key else operand.index(b, n, outer, fetched)

        return pl.BlockSpec(operand.block, index)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.array.shape[0], q.array.shape[1] // q.block[1], *held_Bnm.shape[1:]),
            in_specs=[spec(operand) for operand in operands],
            out_specs=[spec(result) for result in results],
            scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch],
        ),
        out_shape=[result.array for result in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20),
        interpret=tiles.interpret,
        name=name,
    )(held_Bnm.astype(jnp.int32), next_held(held_Bnm), *(operand.array for operand in operands))


def _forward(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles: Tiles):
    operands = q, _, v, _ = _operands(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)
    (B, N, T, _), V, (_, heads, queries, _) = q.array.shape, v_BNSV.shape[3], q.block
    results = [
        Operand(jax.ShapeDtypeStruct((B, N, T, V), v.array.dtype), (1, heads, queries, V), q.index),
        Operand(jax.ShapeDtypeStruct((B, N, 1, T), F32), (1, heads, 1, queries), lambda b, n, i, j: (b, n, 0, i)),
    ]
    scratch = [(heads, queries, LANES), (heads, queries, LANES), (heads, queries, V)]
    out_BNTV, lse_BN1T = _call(_forward_kernel, "sparse_attention", operands, results, scratch, tiles)
    # What a block's recomputation keeps of attention must be this, or else it runs this kernel again.
    out_BNTV, lse_BNT = checkpoint_name((out_BNTV[:, :, : q_BNTH.shape[2]], lse_BN1T[:, :, 0, : q_BNTH.shape[2]]), "attention")
    return (out_BNTV, lse_BNT), (q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT)


def _backward(tiles: Tiles, saved, cotangents):
    q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT = saved
    dout_BNTV, dlse_BNT = cotangents
    delta_BNT = jnp.sum(out_BNTV.astype(F32) * dout_BNTV.astype(F32), axis=-1) - dlse_BNT
    operands = q, k, v, _ = _operands(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)
    T, (_, heads, queries, _), keys = q.array.shape[2], q.block, tiles.keys
    for row_BNT in (lse_BNT, delta_BNT):
        operands.append(Operand(padded(row_BNT, 2, T)[:, :, None], (1, heads, 1, queries), lambda b, n, i, j: (b, n, 0, i)))
    operands.append(Operand(padded(dout_BNTV, 2, T), (1, heads, queries, v.block[3]), q.index))
    like = [operand._replace(array=jax.ShapeDtypeStruct(operand.array.shape, operand.array.dtype)) for operand in (q, k, v)]
    (dq_BNTH,) = _call(_dq_kernel, "sparse_attention_dq", operands, like[:1], [(heads, queries, q.block[3])], tiles)
    sums = [(heads, keys, k.block[3]), (heads, keys, v.block[3])]
    dk_BNSH, dv_BNSV = _call(_dkv_kernel, "sparse_attention_dkv", operands, like[1:], sums, tiles, by_key=True)
    return dq_BNTH[:, :, : q_BNTH.shape[2]], dk_BNSH[:, :, : k_BNSH.shape[2]], dv_BNSV[:, :, : k_BNSH.shape[2]], None


attend_tpu.defvjp(_forward, _backward)
