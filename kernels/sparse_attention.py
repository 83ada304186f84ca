"""Flash attention over selected keys, masked by a bit for each pair of a query and a key.

    out = softmax(q k^T over the selected keys) v            lse = log of its denominator

A tile without any selected key is neither fetched nor computed, forward or backward.

The backward pass needs one number of the softmax for each query and head, `lse`: it computes the
probabilities again from it, tile by tile (arXiv 2205.14135). All heads select the same keys
(DeepSeek sparse attention, arXiv 2512.02556), so a tile's bits are unpacked once for the heads of a
program. Sums are added in a fixed order: the same inputs give the same bits.

| implementation | how |
|---|---|
| reference | a chunk of queries at a time, over all keys |
| tpu | Pallas: one kernel forward, and one backward |
| gpu | Pallas for Hopper: kernels/sparse_attention_gpu.py |

The backward kernel goes over the queries of a tile of keys and sums dk and dv on the chip. dq, a
sum over keys, it keeps in HBM: for each tile it fetches a part of dq, adds to it and writes it
back, so that nothing is computed twice. That makes five products for each tile, where a second
kernel for dq would make seven. The price is that these tiles run in order, on one core.

Letters in the kernels: Q queries and K keys of a tile, L the 128 lanes of a register. Elsewhere K
is the key-value heads, and G the query heads that share one.

The file has more than 400 lines since both kernels share operands, grid and tables of tiles.
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
from kernels.chunks import map_chunks
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, broadcast_lanes, dot, fold_lanes, map_row_groups, padded

DQ_TILES = 3  # tiles of dq on the chip at a time: one arrives, one is added to, one leaves
VMEM_BYTES = 60 * 2**20  # vector memory that a kernel may have


class Tiles(NamedTuple):
    """Sizes of the tiles that the work is cut into.

    A tile has multiples of 128 queries and keys; keys divide 4096. Larger tiles would skip less in
    the forward pass; in the backward pass they halve what dq moves between chip and HBM.
    """

    queries: int = 512
    keys: int = 512
    heads: int = 8  # heads of a program at most
    keys_backward: int = 1024
    heads_backward: int = 4
    interpret: Any = False


def attend_reference(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, *, queries: int = 256
) -> tuple[Array, Array]:
    """Attends to the selected keys, a chunk of queries at a time.

    Args:
      q_BNTH, k_BKSH, v_BKSV, bits_BTW: see `attend_tpu`.
      queries: of a chunk; its logits [B, N, queries, S] are the largest array, backward too.

    Returns: out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.
    """
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]

    def attend_chunk(q_BKGQH: Array, bits_BQW: Array) -> tuple[Array, Array]:
        selected_B11QS = unpack(bits_BQW, k_BKSH.shape[2])[:, None, None]
        logits_BKGQS = jnp.where(
            selected_B11QS,
            jnp.einsum("BKGQH,BKSH->BKGQS", q_BKGQH, k_BKSH, preferred_element_type=F32),
            MASKED,
        )
        max_BKGQ1 = lax.stop_gradient(
            jnp.maximum(jnp.max(logits_BKGQS, axis=-1, keepdims=True), INITIAL_MAX)
        )
        p_BKGQS = jnp.exp(logits_BKGQS - max_BKGQ1)
        has_key_B11Q1 = jnp.any(selected_B11QS, axis=-1, keepdims=True)
        total_BKGQ1 = jnp.where(has_key_B11Q1, jnp.sum(p_BKGQS, axis=-1, keepdims=True), 1.0)
        p_BKGQS = p_BKGQS.astype(v_BKSV.dtype)
        mixed_BKGQV = jnp.einsum("BKGQS,BKSV->BKGQV", p_BKGQS, v_BKSV, preferred_element_type=F32)
        out_BKGQV = mixed_BKGQV / total_BKGQ1
        lse_BKGQ1 = jnp.where(has_key_B11Q1, max_BKGQ1 + jnp.log(total_BKGQ1), 0.0)
        return out_BKGQV.astype(v_BKSV.dtype), lse_BKGQ1[..., 0]

    q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H)
    out_BKGTV, lse_BKGT = map_chunks(
        attend_chunk,
        (q_BKGTH, bits_BTW),
        min(queries, T),
        axes=(3, 1),
        out_axes=3,
        checkpoint=True,
    )
    return out_BKGTV.reshape(B, N, T, -1), lse_BKGT.reshape(B, N, T)


def attend_tpu(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, tiles: Tiles = Tiles()
) -> tuple[Array, Array]:
    """Attends to the selected keys by the TPU's kernels.

    Args:
      q_BNTH, k_BKSH, v_BKSV: heads first; q scaled. Any widths. Each of K heads of keys and values
        serves N / K of queries, side by side.
      bits_BTW: each query's keys, see kernels/bitmask.py.
      tiles: how the work is cut.

    Returns: out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.
    """
    # The backward pass' tables are transposed, and of larger tiles: they take no more memory.
    table = -(-q_BNTH.shape[2] // tiles.queries), -(-k_BKSH.shape[2] // tiles.keys)
    return map_row_groups(
        lambda *rows: _attend(*rows, tiles), table, q_BNTH, k_BKSH, v_BKSV, bits_BTW
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, tiles: Tiles
) -> tuple[Array, Array]:
    return _forward(q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles)[0]


class Operand(NamedTuple):
    """An array (or the shape of a result) and the block of it that a program sees.

    `index` is (b, n, i, j) -> the block's index, for tile i of queries and tile j of keys.
    """

    array: Any
    block: tuple[int, ...]  # its shape
    index: Callable[..., tuple]


def _forward(q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array, tiles: Tiles):
    """Returns (out_BNTV, lse_BNT), and what the backward pass needs."""
    operands = q, _, v, _ = _operands(
        q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles.queries, tiles.keys, tiles.heads
    )
    (B, N, T, _), V, (_, heads, queries, _) = q.array.shape, v_BKSV.shape[3], q.block
    results = [
        Operand(jax.ShapeDtypeStruct((B, N, T, V), v.array.dtype), (1, heads, queries, V), q.index),
        _query_row(jax.ShapeDtypeStruct((B, N, 1, T), F32), heads, queries),
    ]
    scratch = [pltpu.VMEM((heads, queries, width), F32) for width in (LANES, LANES, V)]
    out_BNTV, lse_BN1T = _call(
        _forward_kernel, "sparse_attention", operands, results, scratch, tiles.interpret
    )
    # A recomputed block must keep exactly these of attention, or else it runs this kernel again.
    out_BNTV, lse_BNT = checkpoint_name(
        (out_BNTV[:, :, : q_BNTH.shape[2]], lse_BN1T[:, :, 0, : q_BNTH.shape[2]]), "attention"
    )
    return (out_BNTV, lse_BNT), (q_BNTH, k_BKSH, v_BKSV, bits_BTW, out_BNTV, lse_BNT)


def _backward(tiles: Tiles, saved: tuple[Array, ...], cotangents: tuple[Array, Array]):
    """Returns the gradients to q, k and v."""
    q_BNTH, k_BKSH, v_BKSV, bits_BTW, out_BNTV, lse_BNT = saved
    dout_BNTV, dlse_BNT = cotangents
    delta_BNT = jnp.sum(out_BNTV.astype(F32) * dout_BNTV.astype(F32), axis=-1) - dlse_BNT
    operands = q, k, v, _ = _operands(
        q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles.queries, tiles.keys_backward, tiles.heads_backward
    )
    (B, N, T, H), (_, heads, queries, _), (_, key_heads, keys, _) = q.array.shape, q.block, k.block
    operands += [
        _query_row(padded(row_BNT, 2, T)[:, :, None], heads, queries)
        for row_BNT in (lse_BNT, delta_BNT)
    ]
    operands.append(Operand(padded(dout_BNTV, 2, T), (1, heads, queries, v.block[3]), q.index))
    # Several programs may sum for the same head of keys: their sums are added below.
    programs = N // heads * key_heads // k_BKSH.shape[1]

    def summed(x: Operand) -> Operand:
        shape = B, N // heads * key_heads, *x.array.shape[2:]
        array = jax.ShapeDtypeStruct(shape, F32 if programs > 1 else x.array.dtype)
        return Operand(array, x.block, lambda b, n, i, j: (b, n, j, 0))

    scratch = [
        pltpu.VMEM((key_heads, keys, H), F32),
        pltpu.VMEM((key_heads, keys, v.block[3]), F32),
        pltpu.VMEM((DQ_TILES, heads, H, queries), F32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((DQ_TILES,)),
        pltpu.SemaphoreType.DMA,
    ]
    dk, dv, dq_BNHT = _call(
        _backward_kernel,
        "sparse_attention_backward",
        operands,
        [summed(k), summed(v)],
        scratch,
        tiles.interpret,
        by_key=True,
        updated=jnp.zeros((B, N, H, T), F32),
    )
    dk_BKSH, dv_BKSV = (
        jnp.sum(x.reshape(B, -1, programs, *x.shape[2:]), axis=2)[:, :, : k_BKSH.shape[2]]
        for x in (dk, dv)
    )
    dq_BNTH = jnp.swapaxes(dq_BNHT, 2, 3)[:, :, : q_BNTH.shape[2]]
    return (
        dq_BNTH.astype(q_BNTH.dtype),
        dk_BKSH.astype(k_BKSH.dtype),
        dv_BKSV.astype(v_BKSV.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _operands(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSV: Array,
    bits_BTW: Array,
    queries: int,
    keys: int,
    max_heads: int,
) -> list[Operand]:
    """Pads q, k, v and the bits to whole tiles, and cuts them into a program's blocks.

    A program takes as many heads of queries, `max_heads` at most, as share whole heads of keys or
    one.
    """
    N, group = q_BNTH.shape[1], q_BNTH.shape[1] // k_BKSH.shape[1]
    heads = max(
        heads
        for heads in range(1, max_heads + 1)
        if N % heads == 0 and (heads % group == 0 or group % heads == 0)
    )
    key_heads = max(heads // group, 1)
    programs_of_key_head, tiles_of_word = max(group // heads, 1), KEYS // keys
    T = -(-q_BNTH.shape[2] // queries) * queries
    S = -(-k_BKSH.shape[2] // keys) * keys

    def query_index(b, n, i, j):
        return b, n, i, 0

    def key_index(b, n, i, j):
        return b, lax.div(n, programs_of_key_head), j, 0

    def bits_index(b, n, i, j):
        return b, i, lax.div(j, tiles_of_word)

    return [
        Operand(padded(q_BNTH, 2, T), (1, heads, queries, q_BNTH.shape[3]), query_index),
        Operand(padded(k_BKSH, 2, S), (1, key_heads, keys, k_BKSH.shape[3]), key_index),
        Operand(padded(v_BKSV, 2, S), (1, key_heads, keys, v_BKSV.shape[3]), key_index),
        Operand(padded(bits_BTW, 1, T), (1, queries, LANES), bits_index),
    ]


def _query_row(array: Any, heads: int, queries: int) -> Operand:
    """Makes an operand of a number for each query and head, [B, N, 1, T]."""
    return Operand(array, (1, heads, 1, queries), lambda b, n, i, j: (b, n, 0, i))


def _call(
    kernel: Callable[..., None],
    name: str,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    scratch: Sequence[Any],
    interpret: Any,
    *,
    by_key: bool = False,
    updated: Array | None = None,
) -> Sequence[Array]:
    """Runs a kernel over (b, heads, tiles of queries, tiles of keys), the last in order.

    Args:
      kernel: takes two tables of tiles, then refs of the operands, the results and the scratch.
      name: the kernel's name in profiles.
      operands: q, k, v, bits, and others.
      results: what it computes.
      scratch: memory and semaphores of a program.
      interpret: an interpreter's parameters, or False.
      by_key: makes the tiles of keys the outer of the two axes; both run in order then.
      updated: an array that the kernel updates in HBM: the last operand and the last result.

    Returns: an array for each result, and `updated`.
    """
    q, k, _, bits = operands[:4]
    nonempty_Bnm = nonempty_tiles(bits.array, q.block[2], k.block[2])
    nonempty_Bnm = nonempty_Bnm[..., : k.array.shape[2] // k.block[2]]
    if by_key:
        nonempty_Bnm = jnp.swapaxes(nonempty_Bnm, 1, 2)

    def spec(operand: Operand) -> pl.BlockSpec:
        def index(b, n, outer, inner, nonempty_ref, next_ref):
            inner = next_ref[b, outer, inner]  # an empty tile is not fetched
            return operand.index(b, n, *((inner, outer) if by_key else (outer, inner)))

        return pl.BlockSpec(operand.block, index)

    arrays = [operand.array for operand in operands]
    shapes = [result.array for result in results]
    in_hbm, aliases = [], {}
    if updated is not None:
        aliases = {2 + len(arrays): len(shapes)}  # the two tables of tiles come first
        arrays, shapes = [*arrays, updated], [*shapes, jax.typeof(updated)]
        in_hbm = [pl.BlockSpec(memory_space=pl.ANY)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.array.shape[0], q.array.shape[1] // q.block[1], *nonempty_Bnm.shape[1:]),
            in_specs=[spec(operand) for operand in operands] + in_hbm,
            out_specs=[spec(result) for result in results] + in_hbm,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if by_key else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
        name=name,
        input_output_aliases=aliases,
    )(nonempty_Bnm.astype(jnp.int32), next_nonempty(nonempty_Bnm), *arrays)


def _forward_kernel(
    nonempty_ref, next_ref, q_ref, k_ref, v_ref, bits_ref,
    out_ref, lse_ref, max_ref, total_ref, mixed_ref,
):  # fmt: skip
    """Computes out and lse of a tile of queries, over the tiles of keys in order.

    The running maximum [heads, Q, 128] is equal in all lanes, and the running total is a sum for
    each lane, added up after the last tile: no column is spread over lanes, and only the maximum
    is looked for across them. Only the fetches need `next_ref`.
    """
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, keys = q_ref.shape[1], k_ref.shape[2]

    @pl.when(j == 0)
    def _begin():
        max_ref[...] = jnp.full(max_ref.shape, INITIAL_MAX, F32)
        total_ref[...] = jnp.zeros(total_ref.shape, F32)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)

    @pl.when(nonempty_ref[b, i, j] != 0)
    def _add_tile():
        bias_QK = tile_bias(bits_ref[0], j, keys)

        def logits(head: int) -> Array:
            return dot(q_ref[0, head], k_ref[0, _key_head(head, heads, k_ref)], (1, 1)) + bias_QK

        # The next head's logits come before this head's exponentials: the matrix units make them
        # meanwhile.
        following_QK = logits(0)
        for head in range(heads):
            logits_QK = following_QK
            if head + 1 < heads:
                following_QK = logits(head + 1)
            before_QL = max_ref[head]
            max_QL = jnp.maximum(before_QL, jnp.max(logits_QK, axis=1, keepdims=True))
            p_QK = jnp.exp(logits_QK - broadcast_lanes(max_QL, keys))
            shrink_QL = jnp.exp(before_QL - max_QL)
            max_ref[head] = max_QL
            total_ref[head] = shrink_QL * total_ref[head] + fold_lanes(jnp.add, p_QK)
            p_QK = p_QK.astype(v_ref.dtype)
            mixed_QV = dot(p_QK, v_ref[0, _key_head(head, heads, v_ref)], (1, 0))
            mixed_ref[head] = (
                mixed_ref[head] * broadcast_lanes(shrink_QL, mixed_QV.shape[1]) + mixed_QV
            )

    @pl.when(j == pl.num_programs(3) - 1)
    def _end():
        for head in range(heads):
            total_Q1 = jnp.sum(total_ref[head], axis=1, keepdims=True)
            has_key_Q1 = total_Q1 > 0
            total_Q1 = jnp.where(has_key_Q1, total_Q1, 1.0)
            out_ref[0, head] = (mixed_ref[head] / total_Q1).astype(out_ref.dtype)
            lse_ref[0, head] = jnp.where(has_key_Q1, max_ref[head] + jnp.log(total_Q1), 0.0).T[:1]


class DqTiles(NamedTuple):
    """The tiles of dq on the chip: visits take the DQ_TILES slots in turn.

    A visit is a nonempty tile of queries: while one is added to, the next one's dq is fetched and
    the last one's is written back.
    """

    hbm_ref: Any  # [B, N, H, T] float32
    vmem_ref: Any  # [DQ_TILES, heads, H, Q]; 192 rows of H fill whole registers
    arrived: Any  # a semaphore for each slot
    written: Any  # a semaphore, for the one tile on its way back
    b: Array
    n: Array

    def slot(self, visit: Array) -> Array:
        """Returns the slot of a visit."""
        return lax.rem(visit, DQ_TILES)

    def fetch(self, tile: Array, visit: Array):
        """Returns the copy of this tile of queries to the chip."""
        slot = self.slot(visit)
        return pltpu.make_async_copy(
            self._in_hbm(tile), self.vmem_ref.at[slot], self.arrived.at[slot]
        )

    def write_back(self, tile: Array, visit: Array):
        """Returns the copy of this tile of queries to HBM."""
        return pltpu.make_async_copy(
            self.vmem_ref.at[self.slot(visit)], self._in_hbm(tile), self.written
        )

    def _in_hbm(self, tile: Array):
        _, heads, _, queries = self.vmem_ref.shape
        own_heads = pl.ds(self.n * heads, heads)
        own_queries = pl.ds(pl.multiple_of(tile * queries, LANES), queries)
        return self.hbm_ref.at[self.b, own_heads, :, own_queries]


def _backward_kernel(
    nonempty_ref, next_ref, q_ref, k_ref, v_ref, bits_ref, lse_ref, delta_ref, dout_ref, zeros_ref,
    dk_ref, dv_ref, dq_ref, dk_sum_ref, dv_sum_ref, dq_tiles_ref, visits_ref, arrived, written,
):  # fmt: skip
    """Sums dk and dv of a tile of keys over the tiles of queries in order, and adds to their dq.

    Keys lie along the rows: so a query's `lse` and `delta` lie along lanes, as they are stored.
    """
    del zeros_ref  # dq_ref is the same memory
    b, n, j, i = (pl.program_id(axis) for axis in range(4))
    heads, keys, last = q_ref.shape[1], k_ref.shape[2], pl.num_programs(3) - 1
    dq = DqTiles(dq_ref, dq_tiles_ref, arrived, written, b, n)

    @pl.when(i == 0)
    def _begin():
        visits_ref[0] = 0
        dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, F32)
        dv_sum_ref[...] = jnp.zeros(dv_sum_ref.shape, F32)

    def add_tile(slot: Array) -> None:
        bias_KQ = tile_bias(bits_ref[0], j, keys).T
        for head in range(heads):
            key_head = _key_head(head, heads, k_ref)
            logits_KQ = dot(k_ref[0, key_head], q_ref[0, head], (1, 1))
            p_KQ = jnp.exp(logits_KQ + bias_KQ - lse_ref[0, head])
            dv_sum_ref[key_head] += dot(p_KQ.astype(dout_ref.dtype), dout_ref[0, head], (1, 0))
            dp_KQ = dot(v_ref[0, key_head], dout_ref[0, head], (1, 1))
            dlogits_KQ = (p_KQ * (dp_KQ - delta_ref[0, head])).astype(q_ref.dtype)
            dk_sum_ref[key_head] += dot(dlogits_KQ, q_ref[0, head], (1, 0))
            dq_tiles_ref[slot, head] += dot(k_ref[0, key_head], dlogits_KQ, (0, 0))

    @pl.when(nonempty_ref[b, j, i] != 0)
    def _visit_tile():
        visit, following = visits_ref[0], next_ref[b, j, jnp.minimum(i + 1, last)]

        @pl.when(visit == 0)
        def _fetch_first():
            dq.fetch(i, visit).start()

        @pl.when(following > i)
        def _fetch_following():
            dq.fetch(following, visit + 1).start()

        dq.fetch(i, visit).wait()
        add_tile(dq.slot(visit))

        @pl.when(visit > 0)
        def _wait_for_last():
            dq.write_back(i, visit - 1).wait()

        dq.write_back(i, visit).start()
        visits_ref[0] = visit + 1

    @pl.when(i == last)
    def _end():
        @pl.when(visits_ref[0] > 0)
        def _wait_for_last():
            dq.write_back(i, visits_ref[0] - 1).wait()

        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)


def _key_head(head: int, heads: int, ref: Any) -> int:
    """Returns which of a program's key-value heads serves its query head `head`."""
    return head * ref.shape[1] // heads
