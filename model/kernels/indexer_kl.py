"""The indexer's loss without an array of T x S: KL(p || softmax of the scores over the set), where p is the attention's probabilities, mean over heads
(arXiv 2512.02556, eq. 3 over all keys, eq. 4 over the selected ones).

Each head's probabilities sum to 1 over the set, so p = mean over heads of exp(logits - lse) needs no normalising of its own. With I the scores and L their
log-sum-exp over the set,

    KL = sum over keys of p (log p - I + L)        dKL/dI = softmax(I) - p

so a first pass over the tiles finds L, and a second one the loss and, since a sum's cotangent is one number, its gradients too: w gets the sum of dI relu(q k),
q gets dI w [q k > 0] k, k the same with q. Both passes and the attention's forward skip tiles without a key of the set. The second
one also sums p over a part of the set: in the dense warm-up, over what would be selected, that is the indexer's recall.

The gradient of the indexer's keys is a sum over queries while the tiles run over keys first: it is kept in HBM, and a tile's part fetched, added to and put
back (half a megabyte for 10^10 operations). So the grid must run in order, on one core.

p wants all heads of a tile, whose queries and keys do not fit into VMEM together when a device has all 128: they come HEADS_AT_ONCE by HEADS_AT_ONCE, the
innermost dimension of the grid, and the last of them does the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.indexer import indexer_kl, indexer_scores
from model.kernels.keyset import KEYS, LANES, held_tiles, next_held, tile_bias, unpack
from model.kernels.selection import score_tile
from model.kernels.tile import F32, NO_KEY, SUBLANES, by_rows, by_sublane, dot, padded

AT_ONCE = 16_384  # queries of a call: the tables of its tiles must fit into scalar memory, as in `by_rows`
HEADS_AT_ONCE = 32  # of the attention: 9 MiB of queries and keys, fetched while the 32 before are worked on


class Tiles(NamedTuple):
    """Queries and keys of a tile: multiples of 128; queries divide AT_ONCE, keys 4096."""

    queries: int = 128
    keys: int = 256
    interpret: Any = False


class Attention(NamedTuple):
    """What the indexer is compared with, all heads."""

    q_BNTH: Array
    k_BNSH: Array
    lse_BNT: Array  # over the keys compared


def total_kl_reference(
    attention: Attention, q_BTIC: Array, w_BTI: Array, k_BSC: Array, bits_BTW: Array, selected_BTW: Array, *, queries: int = 256
) -> tuple[Array, Array]:
    """See `total_kl_tpu`. So many queries at a time."""
    (q_BNTH, k_BNSH, lse_BNT), T, S = jax.lax.stop_gradient(attention), q_BTIC.shape[1], k_BSC.shape[1]
    size = -(-T // queries) * queries

    def cut(x: Array, axis: int) -> Array:
        x = padded(x, axis, size)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, queries, *x.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total, piece):
        q_BNCH, lse_BNC, q_BCIC, w_BCI, bits_BCW, selected_BCW = piece
        among_BCS = unpack(bits_BCW, S)
        logits_BNCS = jnp.einsum("BNCH,BNSH->BNCS", q_BNCH, k_BNSH, preferred_element_type=F32)
        p_BCS = jnp.mean(jnp.where(among_BCS[:, None], jnp.exp(logits_BNCS - lse_BNC[..., None]), 0.0), axis=1)
        mass_BC = jnp.sum(jnp.where(unpack(selected_BCW, S), p_BCS, 0.0), axis=-1)
        return total + jnp.sum(indexer_kl(p_BCS, indexer_scores(q_BCIC, k_BSC, w_BCI), among_BCS)), mass_BC

    pieces = cut(q_BNTH, 2), cut(lse_BNT, 2), cut(q_BTIC, 1), cut(w_BTI, 1), cut(bits_BTW, 1), cut(selected_BTW, 1)
    total, mass_nBC = lax.scan(step, jnp.zeros((), F32), pieces)
    return total, jnp.moveaxis(mass_nBC, 0, 1).reshape(q_BTIC.shape[0], -1)[:, :T]


def total_kl_tpu(
    attention: Attention, q_BTIC: Array, w_BTI: Array, k_BSC: Array, bits_BTW: Array, selected_BTW: Array, tiles: Tiles = Tiles()
) -> tuple[Array, Array]:
    """The kernels. Queries need not be a sequence's first ones, nor stand side by side: the sets say what each sees.

    Args:
      attention: as `attend_tpu` had and gave it.
      q_BTIC, w_BTI, k_BSC: the indexer's, see `indexer_scores`.
      bits_BTW: the keys compared, those that lse is over.
      selected_BTW: keys among them.

    Returns:
      The loss summed over all queries, float32; 0 for queries without keys. Its gradient reaches the indexer's q, w and k alone.
      mass_BT: the attention's probability of the selected keys, float32. Without gradient.
    """

    def of_rows(*rows):
        kl, mass_BT = _total_kl(*rows, tiles)
        return kl[None], mass_BT

    table = -(-min(AT_ONCE, q_BTIC.shape[1]) // tiles.queries), -(-k_BSC.shape[1] // tiles.keys)
    kl_n, mass_BT = by_rows(of_rows, table, attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW)
    return jnp.sum(kl_n), mass_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _total_kl(attention: Attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles: Tiles) -> tuple[Array, Array]:
    return _with_gradients(attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles)[0]


def _normaliser_kernel(held_ref, fetch_ref, q_ref, w_ref, k_ref, bits_ref, lse_ref, largest_ref, total_ref):
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, NO_KEY, F32)
        total_ref[...] = jnp.zeros(total_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        scores_QK = score_tile(q_ref[0], k_ref[0], w_ref[0]) + tile_bias(bits_ref[0], j, k_ref.shape[1])
        before_QL = largest_ref[...]
        largest_QL = jnp.maximum(before_QL, jnp.max(scores_QK, axis=1, keepdims=True))
        total_ref[...] = jnp.exp(before_QL - largest_QL) * total_ref[...] + jnp.sum(jnp.exp(scores_QK - largest_QL[:, :1]), axis=1, keepdims=True)
        largest_ref[...] = largest_QL

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        some_QL = total_ref[...] > 0
        lse_ref[0] = jnp.where(some_QL, largest_ref[...] + jnp.log(jnp.where(some_QL, total_ref[...], 1.0)), 0.0).T[:1]


def _kl_kernel(
    held_ref, fetch_ref, q_ref, k_ref, lse_ref, index_q_ref, w_ref, index_k_ref, index_lse_ref, bits_ref, selected_ref, dk_before_ref,
    kl_ref, mass_ref, dq_ref, dw_ref, dk_ref, kl_sum_ref, mass_sum_ref, dq_sum_ref, dw_sum_ref, p_ref, positive_ref, dk_tile_ref, arrived, *, groups: int,
):  # fmt: skip
    """Keys along the rows: so what is one number a query (lse, w) lies along lanes, as it is stored, and no product of a head wants a turned operand.

    p_ref [keys, queries]: the sum over heads so far. positive_ref [I, keys, queries]: relu(q k) of each indexer head, kept for the gradients."""
    del dk_before_ref  # dk_ref is the same memory
    b, i, j, group = (pl.program_id(axis) for axis in range(4))
    heads, I, keys = q_ref.shape[1], index_q_ref.shape[1], index_k_ref.shape[1]
    all_heads = groups == 1 or group == groups - 1

    @pl.when((j == 0) & (group == 0))
    def _():
        for sum_ref in (kl_sum_ref, mass_sum_ref, dq_sum_ref, dw_sum_ref):
            sum_ref[...] = jnp.zeros(sum_ref.shape, F32)

    @pl.when(held_ref[b, i, j] != 0)
    def _():
        dk_here = dk_ref.at[b, pl.ds(pl.multiple_of(j * keys, LANES), keys)]
        fetched = pltpu.make_async_copy(dk_here, dk_tile_ref, arrived)
        pl.when(all_heads)(fetched.start)
        p_KQ = jnp.zeros(p_ref.shape, F32)
        for head in range(heads):  # of keys outside the set, too: they are taken out below
            p_KQ += jnp.exp(dot(k_ref[0, head], q_ref[0, head], (1, 1)) - lse_ref[0, head])
        if groups > 1:
            p_KQ += jnp.where(group == 0, 0.0, p_ref[...])
            p_ref[...] = p_KQ

        @pl.when(all_heads)
        def _():
            chosen_KQ, selected_KQ = (tile_bias(ref[0], j, keys).T == 0 for ref in (bits_ref, selected_ref))
            mean_KQ = jnp.where(chosen_KQ, p_KQ * (1.0 / (heads * groups)), 0.0)
            mass_sum_ref[...] += by_sublane(jnp.add, jnp.where(selected_KQ, mean_KQ, 0.0))
            scores_KQ = jnp.zeros(p_ref.shape, F32)
            for head in range(I):
                positive_KQ = jnp.maximum(dot(index_k_ref[0], index_q_ref[0, head], (1, 1)), 0.0)
                positive_ref[head] = positive_KQ.astype(positive_ref.dtype)
                scores_KQ += positive_KQ * w_ref[0, head]
            log_predicted_KQ = scores_KQ - index_lse_ref[0]
            kl_KQ = mean_KQ * (jnp.log(jnp.where(mean_KQ > 0, mean_KQ, 1.0)) - log_predicted_KQ)
            kl_sum_ref[...] += by_sublane(jnp.add, jnp.where(chosen_KQ, kl_KQ, 0.0))
            dscores_KQ = jnp.where(chosen_KQ, jnp.exp(log_predicted_KQ) - mean_KQ, 0.0)
            turned_CK = index_k_ref[0].T
            fetched.wait()
            dk_KC = dk_tile_ref[...]
            for head in range(I):
                positive_KQ = positive_ref[head].astype(F32)
                dw_sum_ref[head] += by_sublane(jnp.add, dscores_KQ * positive_KQ)
                ddot_KQ = (jnp.where(positive_KQ > 0, dscores_KQ, 0.0) * w_ref[0, head]).astype(index_k_ref.dtype)
                dq_sum_ref[head] += dot(turned_CK, ddot_KQ, (1, 0))
                dk_KC += dot(ddot_KQ, index_q_ref[0, head], (1, 0))
            dk_tile_ref[...] = dk_KC
            put = pltpu.make_async_copy(dk_tile_ref, dk_here, arrived)
            put.start()
            put.wait()

    @pl.when((j == pl.num_programs(2) - 1) & all_heads)
    def _():
        for row_ref, sum_ref in ((kl_ref, kl_sum_ref), (mass_ref, mass_sum_ref)):
            row_ref[0] = jnp.sum(sum_ref[...], axis=0, keepdims=True)
        for head in range(I):
            dq_ref[0, head] = dq_sum_ref[head].T.astype(dq_ref.dtype)
            dw_ref[0, head] = jnp.sum(dw_sum_ref[head], axis=0, keepdims=True)


def _with_gradients(attention: Attention, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, tiles: Tiles):
    """(results, the gradients of the first). AT_ONCE queries a call, k's gradient handed on from call to call."""
    (q_BNTH, k_BNSH, lse_BNT), (B, T, *_), S = attention, q_BTIC.shape, k_BSC.shape[1]
    once = min(AT_ONCE, -(-T // tiles.queries) * tiles.queries)
    keys = padded(k_BNSH, 2, -(-S // tiles.keys) * tiles.keys), padded(k_BSC, 1, -(-S // tiles.keys) * tiles.keys)

    def cut(x: Array, axis: int) -> Array:
        x = padded(x, axis, -(-T // once) * once)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, once, *x.shape[axis + 1 :]), axis, 0)

    def step(dk_BSC, queries):
        *of_queries, dk_BSC = _part(*queries, *keys, dk_BSC, tiles)
        return dk_BSC, of_queries

    def join(x_nBC: Array) -> Array:
        return jnp.moveaxis(x_nBC, 0, 1).reshape(B, -1, *x_nBC.shape[3:])[:, :T]

    zeros_BSC = jnp.zeros((*keys[1].shape[:2], k_BSC.shape[2]), F32)
    pieces = cut(q_BNTH, 2), cut(lse_BNT, 2), cut(q_BTIC, 1), cut(w_BTI, 1), cut(bits_BTW, 1), cut(selected_BTW, 1)
    dk_BSC, of_queries = lax.scan(step, zeros_BSC, pieces)
    kl_BT, mass_BT, dq_BTIC, dw_BTI = map(join, of_queries)
    gradients = dq_BTIC, dw_BTI.astype(w_BTI.dtype), dk_BSC[:, :S].astype(k_BSC.dtype)
    # Named as attention's results are: what keeps those for the backward pass keeps these, or else the loss is computed twice.
    return (jnp.sum(kl_BT), mass_BT), checkpoint_name(gradients, "attention")


def _part(q_BNTH, lse_BNT, q_BTIC, w_BTI, bits_BTW, selected_BTW, k_BNSH, k_BSC, dk_BSC, tiles: Tiles) -> tuple[Array, ...]:
    """(kl_BT, mass_BT, dq_BTIC, dw_BTI, dk_BSC with these queries' added) of whole tiles."""
    (B, N, T, H), S, (I, C) = q_BNTH.shape, k_BNSH.shape[2], q_BTIC.shape[2:]
    queries, keys, of_word = tiles.queries, tiles.keys, KEYS // tiles.keys
    held_Bnm = held_tiles(bits_BTW, queries, keys)[..., : S // keys]
    prefetched = held_Bnm.astype(jnp.int32), next_held(held_Bnm)

    heads = max(count for count in range(1, min(N, HEADS_AT_ONCE) + 1) if N % count == 0)
    groups = N // heads

    def spec(block, index):
        return pl.BlockSpec(block, lambda b, i, j, group, held_ref, fetch_ref: index(b, i, fetch_ref[b, i, j]))

    def spec_of_heads(block, index):
        """Of a tile without a key the heads that are fetched next, or were last."""

        def fetched(b, i, j, group, held_ref, fetch_ref):
            ahead = fetch_ref[b, i, j]
            return index(b, jnp.where(held_ref[b, i, j] != 0, group, jnp.where(ahead > j, 0, groups - 1)), i, ahead)

        return pl.BlockSpec(block, fetched)

    def call(kernel, name, groups, operands, results, scratch, **options):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(*held_Bnm.shape, groups),
                in_specs=[where for _, where in operands],
                out_specs=[where for _, _, where in results],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=60 * 2**20),
            interpret=tiles.interpret,
            name=name,
            **options,
        )(*prefetched, *(operand for operand, _ in operands))

    row = spec((1, 1, queries), lambda b, i, j: (b, 0, i))
    of_head = spec((1, I, queries, C), lambda b, i, j: (b, 0, i, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    index_q = jnp.swapaxes(q_BTIC, 1, 2), of_head
    index_k = k_BSC, spec((1, keys, C), lambda b, i, j: (b, j, 0))
    w_BTI = w_BTI.astype(F32)
    w = w_BTI, spec((1, queries, I), lambda b, i, j: (b, i, 0))
    row_of_head = spec((1, I, 1, queries), lambda b, i, j: (b, 0, 0, i))
    mask, selected = ((bits, spec((1, queries, LANES), lambda b, i, j: (b, i, lax.div(j, of_word)))) for bits in (bits_BTW, selected_BTW))
    lanes = pltpu.VMEM((queries, LANES), F32)
    (index_lse_B1T,) = call(_normaliser_kernel, "indexer_normaliser", 1, [index_q, w, index_k, mask], [((B, 1, T), F32, row)], [lanes, lanes])
    operands = [
        (q_BNTH, spec_of_heads((1, heads, queries, H), lambda b, group, i, j: (b, group, i, 0))),
        (k_BNSH, spec_of_heads((1, heads, keys, H), lambda b, group, i, j: (b, group, j, 0))),
        (lse_BNT[:, :, None], spec_of_heads((1, heads, 1, queries), lambda b, group, i, j: (b, group, 0, i))),
        *(index_q, (jnp.swapaxes(w_BTI, 1, 2)[:, :, None], row_of_head), index_k, (index_lse_B1T, row), mask, selected, (dk_BSC, in_hbm)),
    ]
    results = [
        ((B, 1, T), F32, row),
        ((B, 1, T), F32, row),
        ((B, I, T, C), q_BTIC.dtype, of_head),
        ((B, I, 1, T), F32, row_of_head),
        ((B, S, C), F32, in_hbm),
    ]
    sums = [pltpu.VMEM(shape, F32) for shape in ((SUBLANES, queries), (SUBLANES, queries), (I, C, queries), (I, SUBLANES, queries), (keys, queries))]
    scratch = [*sums, pltpu.VMEM((I, keys, queries), k_BSC.dtype), pltpu.VMEM((keys, C), F32), pltpu.SemaphoreType.DMA]
    before = len(prefetched) + len(operands) - 1
    aliases = {before: len(results) - 1}
    kl_B1T, mass_B1T, dq_BITC, dw_BI1T, dk_BSC = call(
        functools.partial(_kl_kernel, groups=groups), "indexer_kl", groups, operands, results, scratch, input_output_aliases=aliases
    )
    return kl_B1T[:, 0], mass_B1T[:, 0], jnp.swapaxes(dq_BITC, 1, 2), jnp.swapaxes(dw_BI1T[:, :, 0], 1, 2), dk_BSC


def _scaled(tiles: Tiles, gradients, cotangents):
    by, _ = cotangents
    return None, *((by * gradient.astype(F32)).astype(gradient.dtype) for gradient in gradients), None, None


_total_kl.defvjp(_with_gradients, _scaled)
