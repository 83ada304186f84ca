"""Attention over chosen keys as flash attention: masked by a bit a key, and a tile without any
chosen key is neither fetched nor computed, forward or backward.

    out = softmax(q k^T over the chosen keys) v            lse = log of its denominator

Of the softmax the backward pass needs one number a query and head, `lse`: the probabilities are
computed again from it, tile by tile (arXiv 2205.14135). All heads choose the same keys (DeepSeek
sparse attention, arXiv 2512.02556), so a tile's bits are unpacked once for the heads of a program.
Sums are added in a
fixed order: the same inputs give the same bits.

| implementation | how |
|---|---|
| reference | a chunk of queries at a time, over all keys |
| tpu | Pallas: a kernel forward, and one backward |

The backward kernel sums dk and dv over the queries of a tile of keys, on the chip; dq, a sum over
keys, it keeps in HBM, and fetches, adds to and puts back a tile's part, so that nothing is computed
twice: five products a tile, where a second kernel for dq makes them seven. So these tiles run in
order, on one core.
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

from kernels.bitmask import KEYS, LANES, next_nonempty, nonempty_tiles, tile_bias, unpack
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, broadcast_lanes, dot, fold_lanes, map_row_groups, padded

DQ_TILES = 3  # of dq at a time on the chip: one arrives, one is added to, one leaves


class Tiles(NamedTuple):
    """How the work is cut: queries and keys of a tile (multiples of 128; keys divide 4096), and the
    most heads of a program. Larger tiles forward would skip less; backward they halve what dq moves
    between chip and HBM.
    """

    queries: int = 512
    keys: int = 512
    heads: int = 8
    keys_backward: int = 1024
    heads_backward: int = 4
    interpret: Any = False


def attend_reference(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, *, queries: int = 256
) -> tuple[Array, Array]:
    """See `attend_tpu`. A chunk's logits [B, N, C, S] are the largest array, in the backward pass
    too.
    """
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]
    chunk = min(queries, T)
    size = -(-T // chunk) * chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(q_BKGCH, bits_BCW):
        among_B11CS = unpack(bits_BCW, k_BKSH.shape[2])[:, None, None]
        logits_BKGCS = jnp.where(
            among_B11CS,
            jnp.einsum("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH, preferred_element_type=F32),
            MASKED,
        )
        largest_BKGC1 = lax.stop_gradient(
            jnp.maximum(jnp.max(logits_BKGCS, axis=-1, keepdims=True), INITIAL_MAX)
        )
        p_BKGCS = jnp.exp(logits_BKGCS - largest_BKGC1)
        some_B11C1 = jnp.any(among_B11CS, axis=-1, keepdims=True)
        total_BKGC1 = jnp.where(some_B11C1, jnp.sum(p_BKGCS, axis=-1, keepdims=True), 1.0)
        out_BKGCV = (
            jnp.einsum(
                "BKGCS,BKSV->BKGCV",
                p_BKGCS.astype(v_BKSV.dtype),
                v_BKSV,
                preferred_element_type=F32,
            )
            / total_BKGC1
        )
        lse_BKGC1 = jnp.where(some_B11C1, largest_BKGC1 + jnp.log(total_BKGC1), 0.0)
        return out_BKGCV.astype(v_BKSV.dtype), lse_BKGC1[..., 0]

    q_nBKGCH = jnp.moveaxis(padded(q_BNTH, 2, size).reshape(B, K, N // K, -1, chunk, H), 3, 0)
    bits_nBCW = jnp.moveaxis(
        padded(bits_BTW, 1, size).reshape(B, -1, chunk, bits_BTW.shape[2]), 1, 0
    )
    out_nBKGCV, lse_nBKGC = lax.map(lambda piece: step(*piece), (q_nBKGCH, bits_nBCW))
    return jnp.moveaxis(out_nBKGCV, 0, 3).reshape(B, N, size, -1)[:, :, :T], jnp.moveaxis(
        lse_nBKGC, 0, 3
    ).reshape(B, N, size)[:, :, :T]


def attend_tpu(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, tiles: Tiles = Tiles()
) -> tuple[Array, Array]:
    """The kernels.

    Args:
      q_BNTH, k_BKSH, v_BKSV: heads first; q scaled. Any widths. Each of K heads of keys and values
        serves N / K of queries, side by side.
      bits_BTW: each query's keys, see kernels/bitmask.py.

    Returns:
      out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.
    """
    # The backward pass has its tables the other way round, by tiles of keys twice as large: they
    # take no more.
    table = -(-q_BNTH.shape[2] // tiles.queries), -(-k_BKSH.shape[2] // tiles.keys)
    return map_row_groups(
        lambda *rows: _attend(*rows, tiles), table, q_BNTH, k_BKSH, v_BKSV, bits_BTW
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, tiles: Tiles
) -> tuple[Array, Array]:
    return _forward(q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles)[0]


def _forward_kernel(
    held_ref,
    fetch_ref,
    q_ref,
    k_ref,
    v_ref,
    bits_ref,
    out_ref,
    lse_ref,
    largest_ref,
    total_ref,
    mixed_ref,
):
    """`largest` [heads, Q, 128] stands in every lane and `total` is a sum a lane, added up behind
    the last tile: no column is spread over lanes, and only the largest is looked for across them.
    The next head's logits are asked for before this head's exponentials: the matrix units make them
    meanwhile.
    """
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, keys = q_ref.shape[1], k_ref.shape[2]

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, INITIAL_MAX, F32)
        total_ref[...] = jnp.zeros(total_ref.shape, F32)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        bias_QK = tile_bias(bits_ref[0], j, keys)

        def logits(head: int) -> Array:
            return dot(q_ref[0, head], k_ref[0, _serving(head, heads, k_ref)], (1, 1)) + bias_QK

        coming_QK = logits(0)
        for head in range(heads):
            logits_QK, coming_QK = coming_QK, logits(head + 1) if head + 1 < heads else None
            before_QL = largest_ref[head]
            largest_QL = jnp.maximum(before_QL, jnp.max(logits_QK, axis=1, keepdims=True))
            p_QK = jnp.exp(logits_QK - broadcast_lanes(largest_QL, keys))
            shrink_QL = jnp.exp(before_QL - largest_QL)
            largest_ref[head] = largest_QL
            total_ref[head] = shrink_QL * total_ref[head] + fold_lanes(jnp.add, p_QK)
            mixed_QV = dot(p_QK.astype(v_ref.dtype), v_ref[0, _serving(head, heads, v_ref)], (1, 0))
            mixed_ref[head] = (
                mixed_ref[head] * broadcast_lanes(shrink_QL, mixed_QV.shape[1]) + mixed_QV
            )

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for head in range(heads):
            total_Q1 = jnp.sum(total_ref[head], axis=1, keepdims=True)
            some_Q1 = total_Q1 > 0
            total_Q1 = jnp.where(some_Q1, total_Q1, 1.0)
            out_ref[0, head] = (mixed_ref[head] / total_Q1).astype(out_ref.dtype)
            lse_ref[0, head] = jnp.where(some_Q1, largest_ref[head] + jnp.log(total_Q1), 0.0).T[:1]


def _backward_kernel(
    held_ref, fetch_ref, q_ref, k_ref, v_ref, bits_ref, lse_ref, delta_ref, dout_ref, dq_before_ref,
    dk_ref, dv_ref, dq_ref, dk_sum_ref, dv_sum_ref, dq_tile_ref, turn_ref, arrived, left,
):  # fmt: skip
    """Keys along the rows: so a query's `lse` and `delta` lie along lanes, as they are stored. dq
    is [H, queries], whose 192 rows fill whole registers.

    dq_tile_ref [DQ_TILES, heads, H, Q]: while one is added to, the next held tile's arrives and the
    last one's leaves, each in the place that is its turn's.
    """
    del dq_before_ref  # dq_ref is the same memory
    b, n, j, i = (pl.program_id(axis) for axis in range(4))
    heads, keys, queries, last = (
        q_ref.shape[1],
        k_ref.shape[2],
        q_ref.shape[2],
        pl.num_programs(3) - 1,
    )

    def dq_at(tile: Array):
        return dq_ref.at[
            b, pl.ds(n * heads, heads), :, pl.ds(pl.multiple_of(tile * queries, LANES), queries)
        ]

    def fetch(tile: Array, turn: Array):
        place = lax.rem(turn, DQ_TILES)
        return pltpu.make_async_copy(dq_at(tile), dq_tile_ref.at[place], arrived.at[place])

    def put(tile: Array, turn: Array):
        return pltpu.make_async_copy(dq_tile_ref.at[lax.rem(turn, DQ_TILES)], dq_at(tile), left)

    @pl.when(i == 0)
    def _():
        turn_ref[0] = 0
        dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, F32)
        dv_sum_ref[...] = jnp.zeros(dv_sum_ref.shape, F32)

    @pl.when(held_ref[b, j, i] != 0)
    def _():
        turn, after = turn_ref[0], fetch_ref[b, j, jnp.minimum(i + 1, last)]

        @pl.when(turn == 0)
        def _():
            fetch(i, turn).start()

        @pl.when(after > i)
        def _():
            fetch(after, turn + 1).start()

        fetch(i, turn).wait()
        place = lax.rem(turn, DQ_TILES)
        bias_KQ = tile_bias(bits_ref[0], j, keys).T
        for head in range(heads):
            of = _serving(head, heads, k_ref)
            p_KQ = jnp.exp(dot(k_ref[0, of], q_ref[0, head], (1, 1)) + bias_KQ - lse_ref[0, head])
            dv_sum_ref[of] += dot(p_KQ.astype(dout_ref.dtype), dout_ref[0, head], (1, 0))
            dlogits_KQ = (
                p_KQ * (dot(v_ref[0, of], dout_ref[0, head], (1, 1)) - delta_ref[0, head])
            ).astype(q_ref.dtype)
            dk_sum_ref[of] += dot(dlogits_KQ, q_ref[0, head], (1, 0))
            dq_tile_ref[place, head] += dot(k_ref[0, of], dlogits_KQ, (0, 0))

        @pl.when(turn > 0)
        def _():
            put(i, turn - 1).wait()

        put(i, turn).start()
        turn_ref[0] = turn + 1

    @pl.when(i == last)
    def _():
        @pl.when(turn_ref[0] > 0)
        def _():
            put(i, turn_ref[0] - 1).wait()

        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)


def _serving(head: int, heads: int, ref) -> int:
    """Which of a program's heads of keys serves its `head` of queries."""
    return head * ref.shape[1] // heads


class Operand(NamedTuple):
    """An array (or the shape of a result), the block of it that a program sees (None: it stays in
    HBM), and which: (b, n, i, j) -> index, j a tile of keys.
    """

    array: Any
    block: tuple[int, ...] | None
    index: Callable[..., tuple] | None


def _operands(
    q_BNTH, k_BKSH, v_BKSV, bits_BTW, queries: int, keys: int, at_most: int
) -> list[Operand]:
    """q, k, v and the bits in whole tiles. Of heads a program has as many as share whole heads of
    keys, or one.
    """
    N, group = q_BNTH.shape[1], q_BNTH.shape[1] // k_BKSH.shape[1]
    heads = max(
        heads
        for heads in range(1, at_most + 1)
        if N % heads == 0 and (heads % group == 0 or group % heads == 0)
    )
    served, of_word = (
        max(group // heads, 1),
        KEYS // keys,
    )  # programs for one head of keys; tiles of 128 words
    T, S = (
        -(-size // block) * block
        for size, block in ((q_BNTH.shape[2], queries), (k_BKSH.shape[2], keys))
    )

    def of_keys(b, n, i, j):
        return b, lax.div(n, served), j, 0

    return [
        Operand(
            padded(q_BNTH, 2, T),
            (1, heads, queries, q_BNTH.shape[3]),
            lambda b, n, i, j: (b, n, i, 0),
        ),
        Operand(padded(k_BKSH, 2, S), (1, max(heads // group, 1), keys, k_BKSH.shape[3]), of_keys),
        Operand(padded(v_BKSV, 2, S), (1, max(heads // group, 1), keys, v_BKSV.shape[3]), of_keys),
        Operand(
            padded(bits_BTW, 1, T),
            (1, queries, LANES),
            lambda b, n, i, j: (b, i, lax.div(j, of_word)),
        ),
    ]


def _call(
    kernel,
    name: str,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    scratch,
    interpret,
    *,
    by_key: bool = False,
    **options,
):
    """Runs a kernel over (b, heads, tiles of queries, tiles of keys), the last in order; `by_key`
    turns the two round, and both run in order.
    """
    q, k, _, bits = operands[:4]
    held_Bnm = nonempty_tiles(bits.array, q.block[2], k.block[2])[
        ..., : k.array.shape[2] // k.block[2]
    ]
    if by_key:
        held_Bnm = jnp.swapaxes(held_Bnm, 1, 2)

    def spec(operand: Operand) -> pl.BlockSpec:
        def index(b, n, outer, inner, held_ref, fetch_ref):
            fetched = fetch_ref[b, outer, inner]
            return (
                operand.index(b, n, fetched, outer)
                if by_key
                else operand.index(b, n, outer, fetched)
            )

        return (
            pl.BlockSpec(memory_space=pl.ANY)
            if operand.block is None
            else pl.BlockSpec(operand.block, index)
        )

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.array.shape[0], q.array.shape[1] // q.block[1], *held_Bnm.shape[1:]),
            in_specs=[spec(operand) for operand in operands],
            out_specs=[spec(result) for result in results],
            scratch_shapes=scratch,
        ),
        out_shape=[result.array for result in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if by_key else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=60 * 2**20,
        ),
        interpret=interpret,
        name=name,
        **options,
    )(held_Bnm.astype(jnp.int32), next_nonempty(held_Bnm), *(operand.array for operand in operands))


def _forward(q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles: Tiles):
    operands = q, _, v, _ = _operands(
        q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles.queries, tiles.keys, tiles.heads
    )
    (B, N, T, _), V, (_, heads, queries, _) = q.array.shape, v_BKSV.shape[3], q.block
    results = [
        Operand(jax.ShapeDtypeStruct((B, N, T, V), v.array.dtype), (1, heads, queries, V), q.index),
        Operand(
            jax.ShapeDtypeStruct((B, N, 1, T), F32),
            (1, heads, 1, queries),
            lambda b, n, i, j: (b, n, 0, i),
        ),
    ]
    scratch = [pltpu.VMEM((heads, queries, width), F32) for width in (LANES, LANES, V)]
    out_BNTV, lse_BN1T = _call(
        _forward_kernel, "sparse_attention", operands, results, scratch, tiles.interpret
    )
    # What a block's recomputation keeps of attention must be this, or else it runs this kernel
    # again.
    out_BNTV, lse_BNT = checkpoint_name(
        (out_BNTV[:, :, : q_BNTH.shape[2]], lse_BN1T[:, :, 0, : q_BNTH.shape[2]]), "attention"
    )
    return (out_BNTV, lse_BNT), (q_BNTH, k_BKSH, v_BKSV, bits_BTW, out_BNTV, lse_BNT)


def _backward(tiles: Tiles, saved, cotangents):
    q_BNTH, k_BKSH, v_BKSV, bits_BTW, out_BNTV, lse_BNT = saved
    dout_BNTV, dlse_BNT = cotangents
    delta_BNT = jnp.sum(out_BNTV.astype(F32) * dout_BNTV.astype(F32), axis=-1) - dlse_BNT
    operands = q, k, v, _ = _operands(
        q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles.queries, tiles.keys_backward, tiles.heads_backward
    )
    (B, N, T, H), (_, heads, queries, _), (_, shared, keys, _) = q.array.shape, q.block, k.block
    for row_BNT in (lse_BNT, delta_BNT):
        operands.append(
            Operand(
                padded(row_BNT, 2, T)[:, :, None],
                (1, heads, 1, queries),
                lambda b, n, i, j: (b, n, 0, i),
            )
        )
    operands.append(Operand(padded(dout_BNTV, 2, T), (1, heads, queries, v.block[3]), q.index))
    operands.append(Operand(jnp.zeros((B, N, H, T), F32), None, None))
    parts = (
        N // heads * shared // k_BKSH.shape[1]
    )  # programs that sum for the same head of keys: their sums are added below

    def of_parts(x: Operand) -> Operand:
        array = jax.ShapeDtypeStruct(
            (B, N // heads * shared, *x.array.shape[2:]), F32 if parts > 1 else x.array.dtype
        )
        return Operand(array, x.block, lambda b, n, i, j: (b, n, j, 0))

    results = [
        of_parts(k),
        of_parts(v),
        operands[-1]._replace(array=jax.ShapeDtypeStruct((B, N, H, T), F32)),
    ]
    scratch = [
        pltpu.VMEM(shape, F32)
        for shape in ((shared, keys, H), (shared, keys, v.block[3]), (DQ_TILES, heads, H, queries))
    ]
    scratch += [
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((DQ_TILES,)),
        pltpu.SemaphoreType.DMA,
    ]
    aliases = {2 + len(operands) - 1: 2}  # behind the two tables of tiles
    kernel = functools.partial(_call, _backward_kernel, "sparse_attention_backward")
    *of_keys, dq_BNHT = kernel(
        operands, results, scratch, tiles.interpret, by_key=True, input_output_aliases=aliases
    )
    dk_BKSH, dv_BKSV = (
        jnp.sum(x.reshape(B, -1, parts, *x.shape[2:]), axis=2)[:, :, : k_BKSH.shape[2]]
        for x in of_keys
    )
    dq_BNTH = jnp.swapaxes(dq_BNHT, 2, 3)[:, :, : q_BNTH.shape[2]]
    return (
        dq_BNTH.astype(q_BNTH.dtype),
        dk_BKSH.astype(k_BKSH.dtype),
        dv_BKSV.astype(v_BKSV.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)
