"""Lists the tokens that one new query a row reads.

They are the indexer's best and, on request, of those the fewest that reach a share of its softmax:

    scores -> the k best (arXiv 2512.02556, eq. 2) -> the fewest with a share `top_p` of the softmax
    (Twilight, arXiv 2502.02770; the indexer is trained to be this softmax) -> their positions

Nothing is sorted. On TPU it is one kernel: a row's keys are fetched once, its scores stay on the
chip, and both thresholds are found there by counting. Then the mask of selected tokens becomes a
list, by matrix products and without a scatter. Each entry of the list finds its token in three
steps:

1. its block of 128 tokens, from how many tokens are selected before each block;
2. the mask of that block, by a product of all blocks' masks with the entries' one-hot blocks;
3. the token in the block: a product with a triangle of ones numbers the block's selected tokens,
   and the entry takes the one whose number is the entry's.

| implementation | how |
|---|---|
| reference | all scores in memory, `select_topk`, `top_p_keys`, a running count |
| tpu | Pallas |

Letters: k entries of the list, b blocks of 128 tokens, L the 128 tokens of a block.

The file has more than 400 lines since one kernel selects and lists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import LANES
from kernels.reference import WEIGHT_BITS, indexer_scores, select_topk, top_p_keys
from kernels.threshold import find_threshold, from_ordered_int, nth_position, position_bits
from kernels.tiles import F32, dot, fold_pairwise, padded, to_column

GROUP = LANES * LANES  # tokens that are folded, and listed, at a time: 128 blocks of 128
LISTED = 256  # entries of the list that are filled at a time: a chunk of it
SCORED = 1_024  # tokens that are scored at a time: a register's sublanes and lanes


def list_selected_reference(
    q_BIC: Array, k_BSC: Array, w_BI: Array, allowed_BS: Array, topk: int, top_p: float = 1.0
) -> tuple[Array, Array]:
    """Computes what `list_selected_tpu` does, in plain JAX."""
    scores_BS = indexer_scores(q_BIC[:, None], k_BSC, w_BI[:, None])[:, 0]
    return list_positions(
        top_p_keys(scores_BS, select_topk(scores_BS, allowed_BS, topk), top_p),
        min(topk, allowed_BS.shape[1]),
    )


def list_positions(selected_BS: Array, entries: int) -> tuple[Array, Array]:
    """Lists the positions that are true.

    Args:
      selected_BS: bool, at most `entries` of a row true.
      entries: the length of the list.

    Returns: index_Bk int32, the positions in order, each entry after them with the entry's own
      number; and count_B int32, how many positions there are.
    """
    count_BS = jnp.cumsum(selected_BS, axis=1, dtype=jnp.int32)
    entry_k = jnp.arange(entries, dtype=jnp.int32)
    index_Bk = jax.vmap(functools.partial(jnp.searchsorted, v=entry_k + 1))(count_BS).astype(
        jnp.int32
    )
    return jnp.where(entry_k < count_BS[:, -1:], index_Bk, entry_k), count_BS[:, -1]


def list_selected_tpu(
    q_BIC: Array,
    k_BSC: Array,
    w_BI: Array,
    allowed_BS: Array,
    topk: int,
    top_p: float = 1.0,
    *,
    keys: int = 2_048,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Lists the tokens that each row's query reads, in a TPU kernel.

    Args:
      q_BIC, k_BSC, w_BI: the indexer's queries of one token a row, the cache of its keys, and the
        weights of its heads.
      allowed_BS: bool, the tokens a row may read. Keys after the last of them are not fetched.
      topk: how many tokens to select, see `select_topk`.
      top_p: which share of the softmax over those to keep, see `top_p_keys`.
      keys: the tokens of a tile, a multiple of SCORED.
      interpret: as in `pallas_call`.

    Returns: index_Bk of min(topk, S) entries, in order of position, and count_B, see
      `list_positions`.
    """
    B, I, C = q_BIC.shape
    S = k_BSC.shape[1]
    entries, tiles = min(topk, S), -(-S // keys)
    padded_S, padded_k = -(-tiles * keys // GROUP) * GROUP, -(-entries // LISTED) * LISTED
    allowed_BbL = padded(allowed_BS.astype(jnp.int32), 1, tiles * keys).reshape(B, -1, LANES)
    stop_B = jnp.max(jnp.where(allowed_BS, jnp.arange(1, S + 1, dtype=jnp.int32), 0), axis=1)

    def fetched(b, j, stop_ref):
        """Returns tile j, or the last one with an allowed token."""
        return jnp.minimum(j, jnp.maximum(lax.div(stop_ref[b] + keys - 1, keys) - 1, 0))

    index_B1k, count_B1L = pl.pallas_call(
        functools.partial(_kernel, topk=topk, top_p=top_p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, tiles),
            in_specs=[
                pl.BlockSpec((1, I, C), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, 1, I), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, keys, C), lambda b, j, stop: (b, fetched(b, j, stop), 0)),
                pl.BlockSpec(
                    (1, keys // LANES, LANES), lambda b, j, stop: (b, fetched(b, j, stop), 0)
                ),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, padded_k), lambda b, j, _: (b, 0, 0)),
                pl.BlockSpec((1, 1, LANES), lambda b, j, _: (b, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((padded_S // LANES, LANES), F32),
                *(pltpu.VMEM((padded_k // LISTED, rows, LISTED), F32) for rows in (LANES, 1, 1)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, 1, width), jnp.int32) for width in (padded_k, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
        ),
        interpret=interpret,
        name="decode_select",
    )(stop_B, q_BIC, w_BI.astype(F32)[:, None], k_BSC, allowed_BbL)
    return index_B1k[:, 0, :entries], count_B1L[:, 0, 0]


class _Bound(NamedTuple):
    """A set of tokens: those with a value above `level`, and those at it up to position `last`.

    Both are [1, 1].
    """

    level: Array
    last: Array

    def contains(self, x: Array, position: Array) -> Array:
        """Says which of some values, at these positions, are in the set."""
        return (x > self.level) | ((x == self.level) & (position <= self.last))


class _ListRefs(NamedTuple):
    """Scratch for the list, [chunks of the list, ..., LISTED]; a number or a column for each entry.

    Attributes:
      mask [chunks, 128, LISTED]: the mask of the block that the entry's token is in.
      block [chunks, 1, LISTED]: that block's number.
      before [chunks, 1, LISTED]: how many tokens are selected before that block.
    """

    mask: Array
    block: Array
    before: Array


def _kernel(
    stop_ref,
    q_ref,
    w_ref,
    k_ref,
    allowed_ref,
    index_ref,
    count_ref,
    values_ref,
    *list_refs,
    topk: int,
    top_p: float,
):
    """Scores a tile of keys; after the last tile, selects and lists.

    Args:
      stop_ref [B]: the position after each row's last allowed token.
      q_ref [1, I, C], w_ref [1, 1, I], k_ref [1, K, C], allowed_ref [1, K / 128, 128]: operands.
      index_ref [1, 1, entries], count_ref [1, 1, 128]: the results.
      values_ref [blocks, 128]: the row's scores, -inf where not allowed; for top-p its weights take
        their place.
      list_refs: see `_ListRefs`.
      topk, top_p: see `list_selected_tpu`.
    """
    b, j = pl.program_id(0), pl.program_id(1)
    keys, stop = k_ref.shape[1], stop_ref[b]

    @pl.when(j == 0)
    def _begin():
        values_ref[...] = jnp.full(values_ref.shape, -jnp.inf, F32)

    @pl.when(j * keys < stop)
    def _add_tile():
        _score_tile(q_ref, w_ref, k_ref, allowed_ref, values_ref, j)

    @pl.when(j == pl.num_programs(1) - 1)
    def _end():
        groups = lax.div(stop + GROUP - 1, GROUP)
        bound, largest = _best_k(values_ref, groups, topk)
        if top_p < 1:
            _scores_to_weights(values_ref, groups, bound, largest)
            bound = _fewest_with_share(values_ref, groups, top_p)
        _list_tokens(values_ref, groups, bound, index_ref, count_ref, _ListRefs(*list_refs))


def _score_tile(q_ref, w_ref, k_ref, allowed_ref, scores_ref, tile) -> None:
    """Writes a tile's scores (arXiv 2512.02556, eq. 1), SCORED tokens at a time."""
    keys, blocks = k_ref.shape[1], SCORED // LANES
    w_I1 = to_column(w_ref[0])
    for part in range(keys // SCORED):
        heads_IK = dot(q_ref[0], k_ref[0, pl.ds(part * SCORED, SCORED)], (1, 1))
        score_1K = jnp.sum(jnp.maximum(heads_IK, 0.0) * w_I1, axis=0, keepdims=True)
        score_bL = jnp.concatenate(jnp.split(score_1K, SCORED // LANES, axis=1), axis=0)
        allowed_bL = allowed_ref[0, part * blocks : (part + 1) * blocks] != 0
        at = pl.multiple_of((tile * (keys // SCORED) + part) * blocks, blocks)
        scores_ref[pl.ds(at, blocks)] = jnp.where(allowed_bL, score_bL, -jnp.inf)


def _best_k(scores_ref, groups, topk: int) -> tuple[_Bound, Array]:
    """Selects the k best-scored tokens of a row. Of equal scores the earlier goes first.

    Returns: the set, with level float32's least where all allowed tokens are selected; and the
      largest score [1, 1].
    """
    count = functools.partial(_count, scores_ref, groups)
    fold = functools.partial(_fold, scores_ref, groups)
    num_allowed = count(lambda x, _: x > -jnp.inf)
    takes_all = num_allowed <= topk
    largest = fold(lambda x, _: x, -jnp.inf, jnp.maximum, jnp.max)
    least = fold(lambda x, _: jnp.where(x > -jnp.inf, x, jnp.inf), jnp.inf, jnp.minimum, jnp.min)
    low, high = jnp.where(takes_all, 0.0, least), jnp.where(takes_all, 0.0, largest)
    middle = 0.5 * (low + high)
    threshold, at_threshold, above = find_threshold(
        lambda level: count(lambda x, _: x >= level),
        num_allowed,
        takes_all,
        low,
        high,
        middle,
        topk,
    )
    level = jnp.where(takes_all, jnp.finfo(F32).min, threshold)
    tied = ~takes_all & (at_threshold > topk)  # scores tie at the threshold
    everywhere = jnp.full_like(num_allowed, scores_ref.size)
    last = _if_any(tied, lambda: _last_tied(scores_ref, groups, level, topk - above), everywhere)
    return _Bound(level, last), largest


def _scores_to_weights(values_ref, groups, bound: _Bound, largest: Array) -> None:
    """Overwrites a row's scores with exp(score - largest), and with 0 outside the set."""

    @pl.loop(0, groups)
    def _overwrite_group(group):
        x, position = _group_of(values_ref, group)
        values_ref[pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = jnp.where(
            bound.contains(x, position), jnp.exp(x - largest), 0.0
        )


def _fewest_with_share(weights_ref, groups, top_p: float) -> _Bound:
    """Selects the heaviest tokens, as few as have `top_p` of all weights (arXiv 2502.02770).

    The bound's bits are settled one a pass. Of equal weights the earlier token goes first.
    """
    total = functools.partial(_total, weights_ref, groups)
    wanted = top_p * total(lambda x: x > 0)

    def settle(step, found):
        bits = found + (jnp.int32(1) << (WEIGHT_BITS - 1 - step))
        least_weight = from_ordered_int(bits)
        return jnp.where(total(lambda x: x >= least_weight) >= wanted, bits, found)

    bits = lax.fori_loop(0, WEIGHT_BITS, settle, jnp.zeros(wanted.shape, jnp.int32))
    level = from_ordered_int(bits)
    tied = _count(weights_ref, groups, lambda x, _: x == level)
    missing = wanted - total(lambda x: x > level)
    ties = jnp.maximum(jnp.ceil(missing / level), 1.0).astype(jnp.int32)
    everywhere = jnp.full_like(ties, weights_ref.size)
    last = _if_any(tied > ties, lambda: _last_tied(weights_ref, groups, level, ties), everywhere)
    return _Bound(level, last)


def _if_any(condition: Array, compute: Callable[[], Array], otherwise: Array) -> Array:
    """Returns `compute()` where the [1, 1] condition is true, which it seldom is."""
    return lax.cond(jnp.max(condition.astype(jnp.int32)) > 0, compute, lambda: otherwise)


def _last_tied(values_ref, groups, level: Array, wanted: Array) -> Array:
    """Returns the position of the last of the first `wanted` tokens at the level: [1, 1]."""

    def tied_before(bound):
        return _count(values_ref, groups, lambda x, position: (x == level) & (position < bound))

    return nth_position(tied_before, wanted, position_bits(values_ref.size))


def _fold(
    values_ref,
    groups,
    value: Callable[[Array, Array], Array],
    start,
    combine: Callable[[Array, Array], Array],
    reduce: Callable[..., Array],
) -> Array:
    """Folds `value(values, positions)` of the tokens of `groups` groups to [1, 1]."""

    def add_group(group, found):
        x, position = _group_of(values_ref, group)
        parts = jnp.split(value(x, position), LANES // 8, axis=0)
        return combine(found, fold_pairwise(combine, parts))

    found = lax.fori_loop(0, groups, add_group, jnp.full((8, LANES), start))
    return reduce(found, axis=(0, 1), keepdims=True)


def _count(values_ref, groups, test: Callable[[Array, Array], Array]) -> Array:
    """Counts the tokens that pass `test(values, positions)`: [1, 1] int32."""

    def counted(x, position):
        return jnp.where(test(x, position), 1, 0)

    return _fold(values_ref, groups, counted, jnp.int32(0), jnp.add, jnp.sum)


def _total(weights_ref, groups, test: Callable[[Array], Array]) -> Array:
    """Adds up the weights that pass `test(weights)`: [1, 1]."""

    def counted(x, _):
        return jnp.where(test(x), x, 0.0)

    return _fold(weights_ref, groups, counted, 0.0, jnp.add, jnp.sum)


def _group_of(values_ref, group) -> tuple[Array, Array]:
    """Returns the values of a group, 128 blocks of 128 tokens, and their positions."""
    x = values_ref[pl.ds(pl.multiple_of(group * LANES, LANES), LANES)]
    iota = functools.partial(lax.broadcasted_iota, jnp.int32, x.shape)
    return x, group * GROUP + iota(0) * LANES + iota(1)


def _list_tokens(values_ref, groups, bound: _Bound, index_ref, count_ref, refs: _ListRefs) -> None:
    """Writes the positions of a set of tokens, in order, and how many there are.

    Args:
      values_ref, index_ref, count_ref: see `_kernel`.
      groups: how many groups of GROUP tokens the row has.
      bound: the set.
      refs: scratch, which hands the entries' blocks from one step to the next.
    """
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    for ref in refs:
        ref[...] = jnp.zeros(ref.shape, F32)
    total = _find_blocks(values_ref, groups, bound, row, lane, refs)
    _write_positions(index_ref, total, row, lane, refs)
    count_ref[0] = jnp.full((1, LANES), total)


def _find_blocks(
    values_ref, groups, bound: _Bound, row: Array, lane: Array, refs: _ListRefs
) -> Array:
    """Writes to `refs` which block each entry's token is in. Returns how many tokens there are.

    `row` and `lane` are the places of a register's elements, [128, 128]; for the rest see
    `_list_tokens`.
    """

    def find_in_group(group, total):
        """Does so for the entries of a group's tokens, which follow the `total` of those before."""
        mask_bL = jnp.where(bound.contains(*_group_of(values_ref, group)), 1.0, 0.0)
        found = total + jnp.sum(mask_bL).astype(jnp.int32)
        count_bL = jnp.broadcast_to(jnp.sum(mask_bL, axis=1, keepdims=True), mask_bL.shape)
        # Ones, and counts up to 128, are exact in bfloat16, and their sums are in float32.
        first_b1 = (
            total.astype(F32)
            + dot((lane < row).astype(jnp.bfloat16), count_bL.astype(jnp.bfloat16), (1, 0))[:, :1]
        )
        mask_Lb = mask_bL.T.astype(jnp.bfloat16)

        @pl.loop(lax.div(total, LISTED), lax.div(found + LISTED - 1, LISTED))
        def _find_in_chunk(chunk):
            entry_1k = _entries_of(chunk)
            # 1 for the blocks that end before the entry, and for the one block that it is in.
            passed_bk = jnp.where(first_b1 + count_bL[:, :1] <= entry_1k, 1.0, 0.0)
            here_bk = jnp.where(first_b1 <= entry_1k, 1.0, 0.0) - passed_bk
            block_1k = (group * LANES).astype(F32) + jnp.sum(passed_bk, axis=0, keepdims=True)
            refs.block[chunk] += jnp.where(
                jnp.sum(here_bk, axis=0, keepdims=True) > 0, block_1k, 0.0
            )
            refs.before[chunk] += jnp.sum(here_bk * first_b1, axis=0, keepdims=True)
            refs.mask[chunk] += dot(mask_Lb, here_bk.astype(jnp.bfloat16), (1, 0))

        return found

    return lax.fori_loop(0, groups, find_in_group, jnp.int32(0))


def _write_positions(index_ref, total, row: Array, lane: Array, refs: _ListRefs) -> None:
    """Writes the position of each entry's token, and after `total` tokens the entry's number.

    `refs` has the entries' blocks, see `_find_blocks`.
    """
    for chunk in range(refs.mask.shape[0]):
        entry_1k, mask_Lk = _entries_of(chunk), refs.mask[chunk]
        rank_Lk = dot((lane <= row).astype(jnp.bfloat16), mask_Lk.astype(jnp.bfloat16), (1, 0))
        lane_L1 = lax.broadcasted_iota(jnp.int32, (LANES, 1), 0).astype(F32)
        lane_1k = jnp.sum(
            jnp.where(rank_Lk == entry_1k - refs.before[chunk] + 1.0, mask_Lk * lane_L1, 0.0),
            axis=0,
            keepdims=True,
        )
        index_1k = jnp.where(
            entry_1k < total.astype(F32), refs.block[chunk] * LANES + lane_1k, entry_1k
        )
        index_ref[0, :, chunk * LISTED : (chunk + 1) * LISTED] = index_1k.astype(jnp.int32)


def _entries_of(chunk) -> Array:
    """Returns the numbers of a chunk's entries, [1, LISTED] float32."""
    return (chunk * LISTED + lax.broadcasted_iota(jnp.int32, (1, LISTED), 1)).astype(F32)
