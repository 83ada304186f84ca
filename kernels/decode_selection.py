"""Which tokens one new query a row shall read, as a list: the indexer's best, and of those, on
request, the fewest that hold a share of its softmax.

    scores -> the k best (arXiv 2512.02556) -> the fewest with `mass` (Twilight, arXiv 2502.02770;
    the indexer is trained to be this softmax) -> their positions

Nothing is sorted. On TPU it is one kernel: a row's keys come past once, its scores stay on the
chip, and both thresholds are found there by counting. Then the
list is made by products with ones: from how many tokens are selected before each block of 128, a
slot's block is known; a product with the one-hot blocks brings it that block's mask, one with a
triangle ranks the tokens in it, and the slot's is the one whose rank it is.

| implementation | how |
|---|---|
| reference | the scores in full, `select_topk`, `keep_mass`, a running count |
| tpu | Pallas |
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import LANES
from kernels.reference import WEIGHT_BITS, indexer_scores, select_topk, top_p_keys
from kernels.selection import find_threshold, places, unordered
from kernels.tiles import F32, dot, fold_pairwise, padded, to_column

GROUP = LANES * LANES  # tokens that are folded, and listed, at a time: 128 blocks of 128
LISTED = 256  # slots of the list that are filled at a time
SCORED = 1_024  # tokens that are scored at a time: a register's sublanes and lanes


def select_reference(
    q_BIC: Array, k_BSC: Array, w_BI: Array, allowed_BS: Array, topk: int, top_p: float = 1.0
) -> tuple[Array, Array]:
    """See `select_tpu`."""
    scores_BS = indexer_scores(q_BIC[:, None], k_BSC, w_BI[:, None])[:, 0]
    return list_positions(
        top_p_keys(scores_BS, select_topk(scores_BS, allowed_BS, topk), top_p),
        min(topk, allowed_BS.shape[1]),
    )


def list_positions(among_BS: Array, slots: int) -> tuple[Array, Array]:
    """The positions of a set's members in order, and how many there are: (index_Bk, count_B) int32.
    Slots behind the list hold their own numbers.
    """
    count_BS = jnp.cumsum(among_BS, axis=1, dtype=jnp.int32)
    slot_k = jnp.arange(slots, dtype=jnp.int32)
    index_Bk = jax.vmap(functools.partial(jnp.searchsorted, v=slot_k + 1))(count_BS).astype(
        jnp.int32
    )
    return jnp.where(slot_k < count_BS[:, -1:], index_Bk, slot_k), count_BS[:, -1]


def select_tpu(
    q_BIC: Array,
    k_BSC: Array,
    w_BI: Array,
    allowed_BS: Array,
    topk: int,
    top_p: float = 1.0,
    *,
    keys: int = 2_048,
    interpret=False,
) -> tuple[Array, Array]:
    """The kernel.

    Args:
      q_BIC, k_BSC, w_BI: the indexer's queries of one token a row, the cache of its keys, and the
        weights of its heads.
      allowed_BS: bool, the tokens a row may read. Keys behind the last of them are not fetched.
      topk, mass: see `select_topk`, `keep_mass`.
      keys: of a tile, a multiple of SCORED.

    Returns: index_Bk of min(topk, S) slots, in order of position, see `listed`; and count_B.
    """
    B, I, C = q_BIC.shape
    S = k_BSC.shape[1]
    slots, tiles = min(topk, S), -(-S // keys)
    size, room = -(-tiles * keys // GROUP) * GROUP, -(-slots // LISTED) * LISTED
    allowed_BbL = padded(allowed_BS.astype(jnp.int32), 1, tiles * keys).reshape(B, -1, LANES)
    live_B = jnp.max(jnp.where(allowed_BS, jnp.arange(1, S + 1, dtype=jnp.int32), 0), axis=1)

    def fetched(b, j, live_ref):
        return jnp.minimum(j, jnp.maximum(lax.div(live_ref[b] + keys - 1, keys) - 1, 0))

    index_B1k, count_B1L = pl.pallas_call(
        functools.partial(_kernel, topk=topk, mass=top_p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, tiles),
            in_specs=[
                pl.BlockSpec((1, I, C), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, 1, I), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, keys, C), lambda b, j, live_ref: (b, fetched(b, j, live_ref), 0)),
                pl.BlockSpec(
                    (1, keys // LANES, LANES),
                    lambda b, j, live_ref: (b, fetched(b, j, live_ref), 0),
                ),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, room), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, 1, LANES), lambda b, j, _: (b, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((size // LANES, LANES), F32),
                *(pltpu.VMEM((room // LISTED, rows, LISTED), F32) for rows in (LANES, 1, 1)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, 1, width), jnp.int32) for width in (room, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
        ),
        interpret=interpret,
        name="decode_select",
    )(live_B, q_BIC, w_BI.astype(F32)[:, None], k_BSC, allowed_BbL)
    return index_B1k[:, 0, :slots], count_B1L[:, 0, 0]


def _kernel(
    live_ref,
    q_ref,
    w_ref,
    k_ref,
    allowed_ref,
    index_ref,
    count_ref,
    scores_ref,
    *list_refs,
    topk: int,
    mass: float,
):
    """scores_ref [blocks, 128]: a row's scores, -inf where not allowed."""
    b, j = pl.program_id(0), pl.program_id(1)
    keys, live = k_ref.shape[1], live_ref[b]

    @pl.when(j == 0)
    def _():
        scores_ref[...] = jnp.full(scores_ref.shape, -jnp.inf, F32)

    @pl.when(j * keys < live)
    def _():
        w_I1 = to_column(w_ref[0])
        for part in range(keys // SCORED):
            heads_IK = dot(q_ref[0], k_ref[0, pl.ds(part * SCORED, SCORED)], (1, 1))
            score_1K = jnp.sum(jnp.maximum(heads_IK, 0.0) * w_I1, axis=0, keepdims=True)
            score_bL = jnp.concatenate(jnp.split(score_1K, SCORED // LANES, axis=1), axis=0)
            blocks = SCORED // LANES
            allowed_bL = allowed_ref[0, part * blocks : (part + 1) * blocks] != 0
            at = pl.multiple_of((j * (keys // SCORED) + part) * blocks, blocks)
            scores_ref[pl.ds(at, blocks)] = jnp.where(allowed_bL, score_bL, -jnp.inf)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        groups = lax.div(live + GROUP - 1, GROUP)
        level, last = _bounds(scores_ref, groups, topk, mass)
        _list(scores_ref, groups, level, last, index_ref, count_ref, *list_refs)


def _bounds(scores_ref, groups, topk: int, mass: float) -> tuple[Array, Array]:
    """The set, as (level, last): the scores above the level, and those at it up to the position
    `last`. Both [1, 1].
    """

    def fold(value, start, combine, reduce) -> Array:
        """Of `value(scores, positions)` of all tokens, [1, 1]."""

        def one(group, found):
            x, place = _group(scores_ref, group)
            return combine(
                found, fold_pairwise(combine, jnp.split(value(x, place), LANES // 8, axis=0))
            )

        return reduce(
            lax.fori_loop(0, groups, one, jnp.full((8, LANES), start)), axis=(0, 1), keepdims=True
        )

    def count(chosen) -> Array:
        return fold(
            lambda x, place: jnp.where(chosen(x, place), 1, 0), jnp.int32(0), jnp.add, jnp.sum
        )

    def last_tied(chosen, wanted) -> Array:
        """The position of the last of the `wanted` first tokens that are chosen."""

        def settle(step, found):
            bound = found + (jnp.int32(1) << (places(scores_ref.size) - 1 - step))
            return jnp.where(
                count(lambda x, place: chosen(x, place) & (place < bound)) < wanted, bound, found
            )

        return lax.fori_loop(0, places(scores_ref.size), settle, jnp.zeros_like(wanted))

    allowed = count(lambda x, _: x > -jnp.inf)
    few = allowed <= topk
    largest = fold(lambda x, _: x, -jnp.inf, jnp.maximum, jnp.max)
    least = fold(lambda x, _: jnp.where(x > -jnp.inf, x, jnp.inf), jnp.inf, jnp.minimum, jnp.min)
    low, high = jnp.where(few, 0.0, least), jnp.where(few, 0.0, largest)
    level, at, above = find_threshold(
        lambda chosen: count(lambda x, place: chosen(x, 0)),
        allowed,
        few,
        low,
        high,
        0.5 * (low + high),
        topk,
    )
    level = jnp.where(few, jnp.finfo(F32).min, level)
    crowded = ~few & (at > topk)
    everywhere = jnp.full_like(allowed, scores_ref.size)
    last = _where_any(crowded, lambda: last_tied(lambda x, _: x == level, topk - above), everywhere)
    if mass == 1:
        return level, last

    # From here on weights stand in the scores' place, 0 outside the set.
    @pl.loop(0, groups)
    def _(group):
        x, place = _group(scores_ref, group)
        scores_ref[pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = jnp.where(
            _in_set(x, place, level, last), jnp.exp(x - largest), 0.0
        )

    def weigh(chosen) -> Array:
        return fold(lambda x, _: jnp.where(chosen(x), x, 0.0), 0.0, jnp.add, jnp.sum)

    wanted = mass * weigh(lambda x: x > 0)

    def settle(step, found):
        bound = found + (jnp.int32(1) << (WEIGHT_BITS - 1 - step))
        least_weight = unordered(bound)
        return jnp.where(weigh(lambda x: x >= least_weight) >= wanted, bound, found)

    level = unordered(lax.fori_loop(0, WEIGHT_BITS, settle, jnp.zeros(wanted.shape, jnp.int32)))
    tied = count(lambda x, _: x == level)
    ties = jnp.maximum(jnp.ceil((wanted - weigh(lambda x: x > level)) / level), 1.0).astype(
        jnp.int32
    )
    return level, _where_any(
        tied > ties, lambda: last_tied(lambda x, _: x == level, ties), everywhere
    )


def _where_any(condition: Array, found, otherwise: Array) -> Array:
    """`found()` where the [1, 1] condition holds, which is not often."""
    return lax.cond(jnp.max(condition.astype(jnp.int32)) > 0, found, lambda: otherwise)


def _group(scores_ref, group) -> tuple[Array, Array]:
    """128 blocks of scores, and their positions."""
    x = scores_ref[pl.ds(pl.multiple_of(group * LANES, LANES), LANES)]
    return x, group * GROUP + lax.broadcasted_iota(
        jnp.int32, x.shape, 0
    ) * LANES + lax.broadcasted_iota(jnp.int32, x.shape, 1)


def _in_set(x: Array, place: Array, level: Array, last: Array) -> Array:
    return (x > level) | ((x == level) & (place <= last))


def _list(scores_ref, groups, level, last, index_ref, count_ref, mask_ref, block_ref, before_ref):
    """Writes the positions of the set, in order.

    mask_ref [pieces, 128, LISTED]: of each slot the mask of the block its token is in. block_ref,
    before_ref [pieces, 1, LISTED]: that block's number, and how many tokens are selected before it.
    """
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    for ref in (mask_ref, block_ref, before_ref):
        ref[...] = jnp.zeros(ref.shape, F32)

    def slots_of(piece):
        return (piece * LISTED + lax.broadcasted_iota(jnp.int32, (1, LISTED), 1)).astype(F32)

    def gather(group, total):
        """Fills the slots of a group's tokens, which follow the `total` of the groups before."""
        mask_bL = jnp.where(_in_set(*_group(scores_ref, group), level, last), 1.0, 0.0)
        found = total + jnp.sum(mask_bL).astype(jnp.int32)
        held_bL = jnp.broadcast_to(jnp.sum(mask_bL, axis=1, keepdims=True), mask_bL.shape)
        # Ones, and counts up to 128, are exact in bfloat16, and their sums are in float32.
        first_b1 = (
            total.astype(F32)
            + dot((lane < row).astype(jnp.bfloat16), held_bL.astype(jnp.bfloat16), (1, 0))[:, :1]
        )
        mask_Lb = mask_bL.T.astype(jnp.bfloat16)

        @pl.loop(lax.div(total, LISTED), lax.div(found + LISTED - 1, LISTED))
        def _(piece):
            slot_1k = slots_of(piece)
            over_bk = jnp.where(first_b1 + held_bL[:, :1] <= slot_1k, 1.0, 0.0)
            here_bk = jnp.where(first_b1 <= slot_1k, 1.0, 0.0) - over_bk
            block_1k = (group * LANES).astype(F32) + jnp.sum(over_bk, axis=0, keepdims=True)
            block_ref[piece] += jnp.where(
                jnp.sum(here_bk, axis=0, keepdims=True) > 0, block_1k, 0.0
            )
            before_ref[piece] += jnp.sum(here_bk * first_b1, axis=0, keepdims=True)
            mask_ref[piece] += dot(mask_Lb, here_bk.astype(jnp.bfloat16), (1, 0))

        return found

    total = lax.fori_loop(0, groups, gather, jnp.int32(0))
    for piece in range(mask_ref.shape[0]):
        slot_1k, mask_Lk = slots_of(piece), mask_ref[piece]
        rank_Lk = dot((lane <= row).astype(jnp.bfloat16), mask_Lk.astype(jnp.bfloat16), (1, 0))
        lane_L1 = lax.broadcasted_iota(jnp.int32, (LANES, 1), 0).astype(F32)
        lane_1k = jnp.sum(
            jnp.where(rank_Lk == slot_1k - before_ref[piece] + 1.0, mask_Lk * lane_L1, 0.0),
            axis=0,
            keepdims=True,
        )
        index_1k = jnp.where(
            slot_1k < total.astype(F32), block_ref[piece] * LANES + lane_1k, slot_1k
        )
        index_ref[0, :, piece * LISTED : (piece + 1) * LISTED] = index_1k.astype(jnp.int32)
    count_ref[0] = jnp.full((1, LANES), total)
