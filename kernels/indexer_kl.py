"""The indexer's loss without an array of T x S: KL(p || softmax of the scores over the set), where
p is the attention's probabilities, mean over heads (arXiv 2512.02556, eq. 3 over all keys, eq. 4
over the selected ones).

Each head's probabilities sum to 1 over the set, so p = mean over heads of exp(logits - lse) needs
no normalising of its own. With I the scores and L their log-sum-exp over the set,

    KL = sum over keys of p (log p - I + L)        dKL/dI = softmax(I) - p

so a first pass over the tiles finds L, and a second one the loss and, since a sum's cotangent is
one number, its gradients too: w gets the sum of dI relu(q k), q gets dI w [q k > 0] k, k the same
with q. Both passes and the attention's forward skip tiles without a key of the set. The second
one also sums p over a part of the set: in the dense warm-up, over what would be selected, that is
the indexer's recall.

Keys come in pieces of KEYS_AT_ONCE. p wants all heads of the attention, and where those lie over
several devices a piece's keys are gathered when its turn
comes: all keys of all heads would be 8 GiB at 128K. So every gradient is a sum over pieces, in
float32, for QUERIES_AT_ONCE queries at a time. What a kernel
adds to lies in HBM: of dq a block of queries is fetched and put back once a row of tiles, of dk a
tile's keys with every tile, which must therefore run in order, on one core a sequence.

The queries of all heads stay in VMEM for a row of tiles; the keys come HEADS_AT_ONCE by
HEADS_AT_ONCE, the innermost dimension of the grid, and the last of them does the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import KEYS, LANES, next_nonempty, nonempty_tiles, tile_bias, unpack, words
from kernels.device import ambient_device
from kernels.reference import indexer_kl, indexer_scores
from kernels.selection import score_tile
from kernels.tiles import (
    F32,
    INITIAL_MAX,
    SUBLANES,
    dot,
    fold_sublanes,
    map_row_groups,
    padded,
    vmem_bytes,
)

QUERIES_AT_ONCE = (
    16_384  # an eighth of a row of 128K; of more the sums in float32 would be 0.5 GiB each
)
KEYS_AT_ONCE = 16_384  # 1 GiB of 128 heads
HEADS_AT_ONCE = (
    32  # of the keys: 4 MiB for a tile of 256, fetched while the 32 before are worked on
)


class Tiles(NamedTuple):
    """Queries and keys of a tile: multiples of 128; keys divide 4096. 0 queries: `most_queries`."""

    queries: int = 0
    keys: int = 256
    interpret: Any = False


class Attention(NamedTuple):
    """What the indexer is compared with, all heads."""

    q_BNTH: Array
    k_BNSH: Array  # of a device's own heads alone, if heads lie over a mesh axis
    lse_BNT: Array  # over the keys compared


def total_kl_reference(
    attention: Attention,
    q_BTIC: Array,
    w_BTI: Array,
    k_BSC: Array,
    bits_BTW: Array,
    selected_BTW: Array,
    *,
    axis: str = "",
    queries: int = 256,
) -> tuple[Array, Array]:
    """See `total_kl_tpu`. So many queries at a time, over all keys of all heads."""
    (q_BNTH, k_BNSH, lse_BNT), T, S = (
        jax.lax.stop_gradient(attention),
        q_BTIC.shape[1],
        k_BSC.shape[1],
    )
    k_BNSH, k_BSC = all_heads(k_BNSH, axis), k_BSC.astype(q_BTIC.dtype)
    size = -(-T // queries) * queries

    def cut(x: Array, axis: int) -> Array:
        x = padded(x, axis, size)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, queries, *x.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total, piece):
        q_BNCH, lse_BNC, q_BCIC, w_BCI, bits_BCW, selected_BCW = piece
        among_BCS = unpack(bits_BCW, S)
        logits_BNCS = jnp.einsum("BNCH,BNSH->BNCS", q_BNCH, k_BNSH, preferred_element_type=F32)
        p_BCS = jnp.mean(
            jnp.where(among_BCS[:, None], jnp.exp(logits_BNCS - lse_BNC[..., None]), 0.0), axis=1
        )
        mass_BC = jnp.sum(jnp.where(unpack(selected_BCW, S), p_BCS, 0.0), axis=-1)
        return total + jnp.sum(
            indexer_kl(p_BCS, indexer_scores(q_BCIC, k_BSC, w_BCI), among_BCS)
        ), mass_BC

    pieces = (
        cut(q_BNTH, 2),
        cut(lse_BNT, 2),
        cut(q_BTIC, 1),
        cut(w_BTI, 1),
        cut(bits_BTW, 1),
        cut(selected_BTW, 1),
    )
    total, mass_nBC = lax.scan(step, jnp.zeros((), F32), pieces)
    return total, jnp.moveaxis(mass_nBC, 0, 1).reshape(q_BTIC.shape[0], -1)[:, :T]


def all_heads(k_BNSH: Array, axis: str) -> Array:
    """Of a device's own heads, those of all devices of a mesh axis."""
    return lax.all_gather(k_BNSH, axis, axis=1, tiled=True) if axis else k_BNSH


def total_kl_tpu(
    attention: Attention,
    q_BTIC: Array,
    w_BTI: Array,
    k_BSC: Array,
    bits_BTW: Array,
    selected_BTW: Array,
    tiles: Tiles = Tiles(),
    *,
    axis: str = "",
) -> tuple[Array, Array]:
    """The kernels. Queries need not be a sequence's first ones, nor stand side by side: the sets
    say what each sees.

    Args:
      attention: as `attend_tpu` had and gave it.
      q_BTIC, w_BTI, k_BSC: the indexer's, see `indexer_scores`. Keys are multiplied in the queries'
        dtype; in float32 their gradient can be added up further.
      bits_BTW: the keys compared, those that lse is over.
      selected_BTW: keys among them.
      axis: of the mesh that the heads of attention.k_BNSH lie over, if any, inside a shard_map. The
        queries are all heads'.

    Returns:
      The loss summed over all queries, float32; 0 for queries without keys. Its gradient reaches
      the indexer's q, w and k alone.
      mass_BT: the attention's probability of the selected keys, float32. Without gradient.
    """
    tiles = (
        tiles
        if tiles.queries
        else tiles._replace(queries=most_queries(ambient_device().device_kind, q_BTIC.shape[1]))
    )

    def of_rows(*rows):
        kl, mass_BT = _total_kl(*rows, tiles, axis)
        return kl[None], mass_BT

    table = (
        -(-min(QUERIES_AT_ONCE, q_BTIC.shape[1]) // tiles.queries),
        -(-min(KEYS_AT_ONCE, k_BSC.shape[1]) // tiles.keys),
    )
    kl_n, mass_BT = map_row_groups(
        of_rows, table, attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW
    )
    return jnp.sum(kl_n), mass_BT


def most_queries(device_kind: str, T: int) -> int:
    """Of a tile, of T: each key that is fetched serves so many. Where two blocks of 128 stand
    apart, dealt to devices in turn, the nearer one sees keys of the other in vain, a share of 128 /
    T: not worth it for short rows.
    """
    return 256 if vmem_bytes(device_kind) >= 128 * 2**20 and T >= 4_096 else 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _total_kl(
    attention: Attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles: Tiles, axis: str
) -> tuple[Array, Array]:
    return _with_gradients(attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles, axis)[0]


def _normaliser_kernel(
    held_ref, fetch_ref, first_ref, q_ref, w_ref, k_ref, bits_ref, lse_ref, largest_ref, total_ref
):
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, INITIAL_MAX, F32)
        total_ref[...] = jnp.zeros(total_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        scores_QK = score_tile(q_ref[0], k_ref[0], w_ref[0]) + tile_bias(
            bits_ref[0], first_ref[0] + j, k_ref.shape[1]
        )
        before_QL = largest_ref[...]
        largest_QL = jnp.maximum(before_QL, jnp.max(scores_QK, axis=1, keepdims=True))
        total_ref[...] = jnp.exp(before_QL - largest_QL) * total_ref[...] + jnp.sum(
            jnp.exp(scores_QK - largest_QL[:, :1]), axis=1, keepdims=True
        )
        largest_ref[...] = largest_QL

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        # Of a query without keys what it began with: another piece may have some.
        lse_ref[0] = (largest_ref[...] + jnp.log(jnp.maximum(total_ref[...], 1e-30))).T[:1]


def _kl_kernel(
    held_ref, fetch_ref, first_ref, q_ref, k_ref, lse_ref, index_q_ref, w_ref, index_k_ref, index_lse_ref, bits_ref, selected_ref, dq_before_ref, dk_before_ref,
    kl_ref, mass_ref, dw_ref, dq_ref, dk_ref,
    kl_sum_ref, mass_sum_ref, dw_sum_ref, p_ref, positive_ref, dq_row_ref, dk_tile_ref, row_done, tile_done, *, groups: int,
):  # fmt: skip
    """Keys along the rows: so what is one number a query (lse, w) lies along lanes, as it is
    stored, and no product of a head wants a turned operand.

    p_ref [keys, queries]: the sum over heads so far. positive_ref [I, keys, queries]: relu(q k) of
    each indexer head, kept for the gradients. dq_row_ref [I, C, queries]: dq of a row of tiles,
    turned. Its copies have a semaphore of their own, or one nobody waits for could pass as
    another.
    """
    del dq_before_ref, dk_before_ref  # dq_ref and dk_ref are the same memory
    b, i, j, group = (pl.program_id(axis) for axis in range(4))
    heads, I, (keys, queries) = k_ref.shape[1], index_q_ref.shape[1], p_ref.shape
    all_heads = groups == 1 or group == groups - 1
    dq_here = dq_ref.at[b, :, :, pl.ds(pl.multiple_of(i * queries, LANES), queries)]

    @pl.when((j == 0) & (group == 0))
    def _():
        fetched_row = pltpu.make_async_copy(dq_here, dq_row_ref, row_done)
        fetched_row.start()
        for sum_ref in (kl_sum_ref, mass_sum_ref, dw_sum_ref):
            sum_ref[...] = jnp.zeros(sum_ref.shape, F32)
        fetched_row.wait()

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        dk_here = dk_ref.at[b, pl.ds(pl.multiple_of((first_ref[0] + j) * keys, LANES), keys)]
        fetched = pltpu.make_async_copy(dk_here, dk_tile_ref, tile_done)
        pl.when(all_heads)(fetched.start)
        p_KQ = jnp.zeros(p_ref.shape, F32)
        for own in range(heads):  # of keys outside the set, too: they are taken out below
            head = group * heads + own
            p_KQ += jnp.exp(dot(k_ref[0, own], q_ref[0, head], (1, 1)) - lse_ref[0, head])
        if groups > 1:
            p_KQ += jnp.where(group == 0, 0.0, p_ref[...])
            p_ref[...] = p_KQ

        @pl.when(all_heads)
        def _():
            chosen_KQ, selected_KQ = (
                tile_bias(ref[0], first_ref[0] + j, keys).T == 0 for ref in (bits_ref, selected_ref)
            )
            mean_KQ = jnp.where(chosen_KQ, p_KQ * (1.0 / (heads * groups)), 0.0)
            mass_sum_ref[...] += fold_sublanes(jnp.add, jnp.where(selected_KQ, mean_KQ, 0.0))
            scores_KQ = jnp.zeros(p_ref.shape, F32)
            for head in range(I):
                positive_KQ = jnp.maximum(dot(index_k_ref[0], index_q_ref[0, head], (1, 1)), 0.0)
                positive_ref[head] = positive_KQ.astype(positive_ref.dtype)
                scores_KQ += positive_KQ * w_ref[0, head]
            log_predicted_KQ = scores_KQ - index_lse_ref[0]
            kl_KQ = mean_KQ * (jnp.log(jnp.where(mean_KQ > 0, mean_KQ, 1.0)) - log_predicted_KQ)
            kl_sum_ref[...] += fold_sublanes(jnp.add, jnp.where(chosen_KQ, kl_KQ, 0.0))
            dscores_KQ = jnp.where(chosen_KQ, jnp.exp(log_predicted_KQ) - mean_KQ, 0.0)
            turned_CK = index_k_ref[0].T
            fetched.wait()
            dk_KC = dk_tile_ref[...]
            for head in range(I):
                positive_KQ = positive_ref[head].astype(F32)
                dw_sum_ref[head] += fold_sublanes(jnp.add, dscores_KQ * positive_KQ)
                ddot_KQ = (jnp.where(positive_KQ > 0, dscores_KQ, 0.0) * w_ref[0, head]).astype(
                    index_k_ref.dtype
                )
                dq_row_ref[head] += dot(turned_CK, ddot_KQ, (1, 0))
                dk_KC += dot(ddot_KQ, index_q_ref[0, head], (1, 0))
            dk_tile_ref[...] = dk_KC
            put = pltpu.make_async_copy(dk_tile_ref, dk_here, tile_done)
            put.start()
            put.wait()

    @pl.when((j == pl.num_programs(2) - 1) & all_heads)
    def _():
        put_row = pltpu.make_async_copy(dq_row_ref, dq_here, row_done)
        put_row.start()
        for row_ref, sum_ref in ((kl_ref, kl_sum_ref), (mass_ref, mass_sum_ref)):
            row_ref[0] = jnp.sum(sum_ref[...], axis=0, keepdims=True)
        for head in range(I):
            dw_ref[0, head] = jnp.sum(dw_sum_ref[head], axis=0, keepdims=True)
        put_row.wait()


def _with_gradients(
    attention: Attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles: Tiles, axis: str
):
    """(results, the gradients of the first): of whole tiles, piece by piece of the queries, and of
    the keys to each.
    """
    (q_BNTH, k_BNSH, lse_BNT), (B, T, *_), S = attention, q_BTIC.shape, k_BSC.shape[1]
    once = min(QUERIES_AT_ONCE, -(-T // tiles.queries) * tiles.queries)
    of_keys = min(KEYS_AT_ONCE, -(-S // tiles.keys) * tiles.keys)
    whole_S = -(-S // of_keys) * of_keys
    keys = padded(k_BNSH, 2, whole_S), padded(k_BSC.astype(q_BTIC.dtype), 1, whole_S)
    bits_BTW, selected_BTW = (padded(x, 2, words(whole_S)) for x in (bits_BTW, selected_BTW))

    def cut(x: Array, axis: int) -> Array:
        x = padded(x, axis, -(-T // once) * once)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, once, *x.shape[axis + 1 :]), axis, 0)

    def step(dk_BSC, queries):
        *of_queries, dk_BSC = _piece(*queries, *keys, dk_BSC, of_keys, tiles, axis)
        return dk_BSC, of_queries

    def join(x_nBC: Array) -> Array:
        return jnp.moveaxis(x_nBC, 0, 1).reshape(B, -1, *x_nBC.shape[3:])[:, :T]

    pieces = (
        cut(q_BNTH, 2),
        cut(lse_BNT, 2),
        cut(q_BTIC, 1),
        cut(w_BTI.astype(F32), 1),
        cut(bits_BTW, 1),
        cut(selected_BTW, 1),
    )
    dk_BSC, of_queries = lax.scan(step, jnp.zeros(keys[1].shape, F32), pieces)
    kl_BT, mass_BT, dq_BTIC, dw_BTI = map(join, of_queries)
    gradients = dq_BTIC, dw_BTI.astype(w_BTI.dtype), dk_BSC[:, :S].astype(k_BSC.dtype)
    # Named as attention's results are: what keeps those for the backward pass keeps these, or else
    # the loss is computed twice.
    return (jnp.sum(kl_BT), mass_BT), checkpoint_name(gradients, "attention")


def _piece(
    q_BNTH,
    lse_BNT,
    q_BTIC,
    w_BTI,
    bits_BTW,
    selected_BTW,
    k_BNSH,
    k_BSC,
    dk_BSC,
    once: int,
    tiles: Tiles,
    axis: str,
) -> tuple[Array, ...]:
    """(kl_BT, mass_BT, dq_BTIC, dw_BTI, dk_BSC with these queries' added), `once` keys at a
    time.
    """
    (B, T, I, C), (queries, keys, _) = q_BTIC.shape, tiles
    indexer = jnp.swapaxes(q_BTIC, 1, 2), w_BTI, k_BSC
    held_Bnm = nonempty_tiles(bits_BTW, queries, keys)

    def tables(first):
        held_Bnp = lax.dynamic_slice_in_dim(held_Bnm, first // keys, once // keys, 2)
        return held_Bnp.astype(jnp.int32), next_nonempty(held_Bnp), first[None] // keys

    def normaliser(first):
        return _normaliser(tables(first), *indexer, bits_BTW, tiles)

    def step(sums, first):
        # Tied to the sums before, or else JAX, which sees that keys depend on nothing that learns,
        # gathers all pieces first, in a loop of its own.
        (before, *gradients), first = lax.optimization_barrier((sums, first))
        compared = Attention(
            q_BNTH, all_heads(lax.dynamic_slice_in_dim(k_BNSH, first, once, 2), axis), lse_BNT
        )
        *of_queries, dq_BICT, dk_BSC = _loss(
            tables(first),
            compared,
            *indexer,
            index_lse_B1T,
            bits_BTW,
            selected_BTW,
            *gradients,
            tiles,
        )
        return (
            [one + other for one, other in zip(before, of_queries, strict=True)],
            dq_BICT,
            dk_BSC,
        ), None

    first_p = jnp.arange(0, k_BSC.shape[1], once, dtype=jnp.int32)
    index_lse_B1T = jax.nn.logsumexp(lax.map(normaliser, first_p), axis=0)
    zeros = (
        [jnp.zeros((B, *rows, 1, T), F32) for rows in ((), (), (I,))],
        jnp.zeros((B, I, C, T), F32),
        dk_BSC,
    )
    ((kl_B1T, mass_B1T, dw_BI1T), dq_BICT, dk_BSC), _ = lax.scan(step, zeros, first_p)
    return (
        kl_B1T[:, 0],
        mass_B1T[:, 0],
        jnp.transpose(dq_BICT, (0, 3, 1, 2)).astype(q_BTIC.dtype),
        jnp.swapaxes(dw_BI1T[:, :, 0], 1, 2),
        dk_BSC,
    )


def _spec(block: tuple[int, ...], index: Callable, **options) -> pl.BlockSpec:
    """`index`: (b, i, tile of the sequence) -> which block. Of a tile without a key it is the next
    one's with any, which is fetched then.
    """

    def fetched(b, i, j, group, held_ref, fetch_ref, first_ref):
        return index(b, i, first_ref[0] + fetch_ref[b, i, j])

    return pl.BlockSpec(block, fetched, **options)


def _over_tiles(
    kernel,
    name: str,
    tables,
    groups: int,
    operands,
    results,
    scratch,
    semantics,
    tiles: Tiles,
    aliases: dict[int, int],
):
    """`operands`: (array, where); `results`: (shape, where), all float32. `aliases`: of operands to
    results.
    """
    limit = vmem_bytes(ambient_device().device_kind) * 15 // 16  # the rest is the compiler's own
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(*tables[0].shape, groups),
            in_specs=[where for _, where in operands],
            out_specs=[where for _, where in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, F32) for shape, _ in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit),
        input_output_aliases={len(tables) + at: result for at, result in aliases.items()},
        interpret=tiles.interpret,
        name=name,
    )(*tables, *(operand for operand, _ in operands))


def _indexer_operands(index_q_BITC, index_k_BSC, *bits, tiles: Tiles) -> tuple:
    """(q, k, bits ...): with where they are."""
    (_, I, _, C), of_word = index_q_BITC.shape, KEYS // tiles.keys
    of_bits = _spec((1, tiles.queries, LANES), lambda b, i, j: (b, i, lax.div(j, of_word)))
    return (
        (index_q_BITC, _spec((1, I, tiles.queries, C), lambda b, i, j: (b, 0, i, 0))),
        (index_k_BSC, _spec((1, tiles.keys, C), lambda b, i, j: (b, j, 0))),
        *((one, of_bits) for one in bits),
    )


def _row(queries: int) -> pl.BlockSpec:
    """Of a number a query."""
    return _spec((1, 1, queries), lambda b, i, j: (b, 0, i))


def _normaliser(tables, index_q_BITC, index_w_BTI, index_k_BSC, bits_BTW, tiles: Tiles) -> Array:
    """Log-sum-exp of the scores over a piece's keys in the set, [B, 1, T]; NO_KEY and less without
    any.
    """
    (B, I, T, _), queries = index_q_BITC.shape, tiles.queries
    q, k, bits = _indexer_operands(index_q_BITC, index_k_BSC, bits_BTW, tiles=tiles)
    w = index_w_BTI, _spec((1, queries, I), lambda b, i, j: (b, i, 0))
    lanes = pltpu.VMEM((queries, LANES), F32)
    semantics = "parallel", "parallel", "arbitrary", "arbitrary"
    results = [((B, 1, T), _row(queries))]
    return _over_tiles(
        _normaliser_kernel,
        "indexer_normaliser",
        tables,
        1,
        [q, w, k, bits],
        results,
        [lanes, lanes],
        semantics,
        tiles,
        {},
    )[0]


def _loss(
    tables,
    attention: Attention,
    index_q_BITC,
    index_w_BTI,
    index_k_BSC,
    index_lse_B1T,
    bits_BTW,
    selected_BTW,
    dq_BICT,
    dk_BSC,
    tiles: Tiles,
):
    """(kl_B1T, mass_B1T, dw_BI1T, dq_BICT, dk_BSC) of a piece's keys, these added to dq and dk as
    given.
    """
    (q_BNTH, k_BNPH, lse_BNT), (B, I, T, C), (queries, keys, _) = (
        attention,
        index_q_BITC.shape,
        tiles,
    )
    N, H = q_BNTH.shape[1], q_BNTH.shape[3]
    heads = max(count for count in range(1, min(N, HEADS_AT_ONCE) + 1) if N % count == 0)
    groups = N // heads

    def of_group(b, i, j, group, held_ref, fetch_ref, first_ref):
        """Of a tile without a key the heads that are fetched next, or were last."""
        ahead = fetch_ref[b, i, j]
        return (
            b,
            jnp.where(held_ref[b, i, j] != 0, group, jnp.where(ahead > j, 0, groups - 1)),
            ahead,
            0,
        )

    row, in_hbm = _row(queries), pl.BlockSpec(memory_space=pl.ANY)
    row_of_head = _spec((1, I, 1, queries), lambda b, i, j: (b, 0, 0, i))
    index_q, index_k, *bits = _indexer_operands(
        index_q_BITC, index_k_BSC, bits_BTW, selected_BTW, tiles=tiles
    )
    index_w = jnp.swapaxes(index_w_BTI, 1, 2)[:, :, None], row_of_head
    once_a_row = _spec(
        (1, N, queries, H), lambda b, i, j: (b, 0, i, 0), pipeline_mode=pl.Buffered(1)
    )
    operands = [
        (q_BNTH, once_a_row),
        (k_BNPH, pl.BlockSpec((1, heads, keys, H), of_group)),
        (lse_BNT[:, :, None], _spec((1, N, 1, queries), lambda b, i, j: (b, 0, 0, i))),
        *(
            index_q,
            index_w,
            index_k,
            (index_lse_B1T, row),
            *bits,
            (dq_BICT, in_hbm),
            (dk_BSC, in_hbm),
        ),
    ]
    results = [
        ((B, 1, T), row),
        ((B, 1, T), row),
        ((B, I, 1, T), row_of_head),
        (dq_BICT.shape, in_hbm),
        (dk_BSC.shape, in_hbm),
    ]
    sums = [
        pltpu.VMEM(shape, F32)
        for shape in (
            (SUBLANES, queries),
            (SUBLANES, queries),
            (I, SUBLANES, queries),
            (keys, queries),
        )
    ]
    kept = [
        pltpu.VMEM((I, keys, queries), index_k_BSC.dtype),
        pltpu.VMEM((I, C, queries), F32),
        pltpu.VMEM((keys, C), F32),
    ]
    scratch, kernel = (
        [*sums, *kept, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
        functools.partial(_kl_kernel, groups=groups),
    )
    semantics = "parallel", "arbitrary", "arbitrary", "arbitrary"  # dk and dq are a sequence's own
    aliases = {len(operands) - 2: 3, len(operands) - 1: 4}
    return _over_tiles(
        kernel, "indexer_kl", tables, groups, operands, results, scratch, semantics, tiles, aliases
    )


def _scaled(tiles: Tiles, axis: str, gradients, cotangents):
    by, _ = cotangents
    return (
        None,
        *((by * gradient.astype(F32)).astype(gradient.dtype) for gradient in gradients),
        None,
        None,
    )


_total_kl.defvjp(_with_gradients, _scaled)
