"""Selects the best-scored keys of each query, exactly and without a sort (arXiv 2512.02556, eq. 2).

The indexer's scores [T, S] never leave the chip. A block of queries scores every key before it into
VMEM; then, eight queries at a time, `threshold.find_threshold` moves a bound until exactly k scores
are at or above it. Of equal scores the earlier key goes first, as in `reference.select_topk`.

| implementation | how |
|---|---|
| reference | a chunk of queries at a time, all their scores in memory |
| tpu | Pallas |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import BITS, KEYS, LANES, bit, num_words, pack
from kernels.chunks import map_chunks
from kernels.reference import indexer_scores, select_topk
from kernels.threshold import find_threshold, normal_quantile, nth_position, position_bits
from kernels.tiles import F32, dot, fold_lanes, fold_pairwise, padded

# Queries of a block stand side by side in the sequence. Blocks need not: on a mesh a device has
# every n-th of them (model/attention/tiled.py).
BLOCK = 128
ROWS = 8  # queries whose bounds move together: the sublanes of a register
SCORES_BYTES = 32 * 2**20  # of VMEM for a block's scores: half of what the smallest chips have
TILE_PAIRS = 2**16  # pairs of a query and a key in a tile, which is scored at a time
# Rows of a product, the queries of one head or several: as many as the matrix units multiply with a
# tile's keys once those are loaded.
PRODUCT_ROWS = 512

LARGEST, LEAST, TOTAL, SQUARES = range(4)  # the stats of a row's scores before the search


def select_reference(
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    segments_BT: Array,
    key_segments_BS: Array,
    query_index_T: Array,
    topk: int,
    *,
    queries: int = 512,
) -> tuple[Array, Array]:
    """Computes what `select_tpu` does, in plain JAX, `queries` queries at a time."""
    S = k_BSC.shape[1]

    def select(q_BTIC, w_BTI, segments_BT, query_index_T):
        """Selects keys for a chunk of queries; returns bitmasks and the least selected scores."""
        segment_BT1, query_index_T1 = segments_BT[..., None], query_index_T[..., None]
        allowed_BTS = (
            (jnp.arange(S) <= query_index_T1)
            & (segment_BT1 == key_segments_BS[:, None])
            & (segment_BT1 > 0)
        )
        scores_BTS = indexer_scores(q_BTIC, k_BSC, w_BTI)
        selected_BTS = select_topk(scores_BTS, allowed_BTS, topk)
        takes_all_BT = jnp.sum(allowed_BTS, axis=-1) <= topk
        return pack(selected_BTS), jnp.where(
            takes_all_BT, -jnp.inf, jnp.min(jnp.where(selected_BTS, scores_BTS, jnp.inf), axis=-1)
        )

    return map_chunks(
        select,
        (q_BTIC, w_BTI, segments_BT, query_index_T),
        min(queries, segments_BT.shape[1]),
        axes=(1, 1, 1, 0),
    )


def select_tpu(
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    segments_BT: Array,
    key_segments_BS: Array,
    query_index_T: Array,
    topk: int,
    *,
    queries: int = 0,
    keys: int = 0,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Selects each query's keys, in a TPU kernel.

    Args:
      q_BTIC, w_BTI: the indexer's queries and the weights of their heads, see `indexer_scores`.
      k_BSC: its keys, of the whole sequence.
      segments_BT, key_segments_BS: a query may select keys of its own segment up to itself; a query
        of segment 0 none.
      query_index_T: where each query stands in the sequence; those of a BLOCK side by side.
      topk: how many keys to select.
      queries: the queries of a block: a divisor of BLOCK and a multiple of 8, or any size if there
        is one block; 0 for as many as SCORES_BYTES allow, at most BLOCK.
      keys: the keys of a tile: 128, 256, ..., 4096; 0 for as many as TILE_PAIRS allows.
      interpret: as in `pallas_call`.

    Returns:
      bits_BTW: the min(topk, allowed) best-scored allowed keys of each query, a bitmask. Of equal
        scores the earlier key goes first. `bitmask.count_keys` counts them.
      threshold_BT: float32; every allowed key of a higher score is selected, none of a lower one.
        -inf where all allowed keys are.
    """
    (B, T, I, C), S = q_BTIC.shape, k_BSC.shape[1]
    W = num_words(S)
    queries = queries or min(most_queries(S), -(-T // ROWS) * ROWS)
    keys = keys or most_keys(queries)
    nq, nk = -(-T // queries), -(-S // keys)
    # J = I + 1: a query's segment follows its weights, since in an array of its own each would fill
    # 128 lanes. As a float it is exact up to 2^24.
    w_BTJ = jnp.concatenate([w_BTI.astype(F32), segments_BT[..., None].astype(F32)], axis=-1)

    def fetched(i, j, first_ref):
        """Returns tile j, or the last one that any query of block i may see."""
        last = lax.div(first_ref[i] + queries - 1, keys)
        return jnp.minimum(jnp.minimum(j, last), nk - 1)

    bits_BTW, threshold_Bn1Q = pl.pallas_call(
        functools.partial(_kernel, heads=I, topk=topk, tiles=nk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, nq, nk),
            in_specs=[
                pl.BlockSpec((1, I, queries, C), lambda b, i, j, _: (b, 0, i, 0)),
                pl.BlockSpec((1, queries, I + 1), lambda b, i, j, _: (b, i, 0)),
                pl.BlockSpec((1, keys, C), lambda b, i, j, first: (b, fetched(i, j, first), 0)),
                pl.BlockSpec((1, 1, keys), lambda b, i, j, first: (b, 0, fetched(i, j, first))),
            ],
            out_specs=[
                pl.BlockSpec((1, queries, W), lambda b, i, j, _: (b, i, 0)),
                pl.BlockSpec((1, 1, 1, queries), lambda b, i, j, _: (b, i, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((W // LANES, queries, KEYS), F32),
                pltpu.VMEM((4, queries, LANES), F32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, nq * queries, W), jnp.int32),
            jax.ShapeDtypeStruct((B, nq, 1, queries), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
        ),
        interpret=interpret,
        name="select",
    )(
        padded(query_index_T, 0, nq * queries)[::queries].astype(jnp.int32),
        padded(jnp.swapaxes(q_BTIC, 1, 2), 2, nq * queries),
        padded(w_BTJ, 1, nq * queries),
        padded(k_BSC, 1, nk * keys),
        padded(key_segments_BS, 1, nk * keys).astype(F32)[:, None],
    )
    return bits_BTW[:, :T], threshold_Bn1Q.reshape(B, -1)[:, :T]


def most_queries(S: int) -> int:
    """Returns the queries of a block: the power of two that SCORES_BYTES allow with S keys."""
    return min(BLOCK, max(_power_of_two(SCORES_BYTES // (4 * BITS * num_words(S))), ROWS))


def most_keys(queries: int) -> int:
    """Returns the keys of a tile of so many queries: the power of two that TILE_PAIRS allows."""
    return min(KEYS, max(_power_of_two(TILE_PAIRS // queries), LANES))


def _power_of_two(most: int) -> int:
    """Returns the largest power of two up to `most`."""
    return 1 << most.bit_length() >> 1


def _kernel(
    first_ref,
    q_ref,
    w_ref,
    k_ref,
    segments_ref,
    bits_ref,
    threshold_ref,
    scores_ref,
    stats_ref,
    *,
    heads: int,
    topk: int,
    tiles: int,
):
    """Scores a tile of keys; after the last tile, selects.

    Args:
      first_ref [blocks]: the position of each block's first query in the sequence.
      q_ref [1, I, Q, C], k_ref [1, K, C]: the indexer's queries and keys.
      w_ref [1, Q, I + 1]: the weights of the heads, and the queries' segments.
      segments_ref [1, 1, K]: the keys' segments.
      bits_ref [1, Q, W], threshold_ref [1, 1, 1, Q]: the results.
      scores_ref [blocks of words, Q, KEYS]: the block's scores, -inf where not allowed.
      stats_ref [4, Q, 128]: their LARGEST, LEAST, TOTAL and SQUARES, lane by lane.
      heads: I.
      topk: how many keys to select.
      tiles: how many tiles a sequence has.
    """
    j, first = pl.program_id(2), first_ref[pl.program_id(1)]
    queries, keys = scores_ref.shape[1], k_ref.shape[1]
    # Beyond these tiles none of the block's queries may attend to any key.
    visible_tiles = jnp.minimum(lax.div(first + queries - 1, keys) + 1, tiles)

    @pl.when(j == 0)
    def _begin():
        for which, start in ((LARGEST, -jnp.inf), (LEAST, jnp.inf), (TOTAL, 0.0), (SQUARES, 0.0)):
            stats_ref[which] = jnp.full((queries, LANES), start, F32)

    @pl.when(j < visible_tiles)
    def _add_tile():
        scores = score_tile(q_ref[0], k_ref[0], w_ref[0])
        query_index = first + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        key_index = j * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        segment = w_ref[0, :, heads : heads + 1]  # of each query, after its weights
        allowed = (key_index <= query_index) & (segment == segments_ref[0]) & (segment > 0)
        scores_ref[_tile_index(j, keys, slice(None))] = jnp.where(allowed, scores, -jnp.inf)
        _update_stats(stats_ref, scores, allowed)

    @pl.when(j == tiles - 1)
    def _end():
        @pl.loop(0, queries // ROWS)
        def _select_group(group):
            rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)
            # These rows' stats have been read: their thresholds take the place of the largest.
            stats_ref[LARGEST, rows] = jnp.broadcast_to(
                _select_rows(
                    scores_ref, stats_ref, bits_ref, rows, visible_tiles * keys, keys, topk
                ),
                (ROWS, LANES),
            )

        threshold_ref[0, 0] = stats_ref[LARGEST].T[:1]


def _tile_index(tile, keys: int, rows) -> tuple[Any, ...]:
    """Returns the index of some rows of a tile in scores_ref."""
    per = KEYS // keys
    return lax.div(tile, per), rows, pl.ds(pl.multiple_of(lax.rem(tile, per) * keys, LANES), keys)


def _update_stats(stats_ref, scores_QK: Array, allowed_QK: Array) -> None:
    """Adds a tile's allowed scores to the stats of each row."""
    kept = jnp.where(allowed_QK, scores_QK, 0.0)
    stats_ref[LARGEST] = jnp.maximum(
        stats_ref[LARGEST], fold_lanes(jnp.maximum, jnp.where(allowed_QK, scores_QK, -jnp.inf))
    )
    stats_ref[LEAST] = jnp.minimum(
        stats_ref[LEAST], fold_lanes(jnp.minimum, jnp.where(allowed_QK, scores_QK, jnp.inf))
    )
    stats_ref[TOTAL] += fold_lanes(jnp.add, kept)
    stats_ref[SQUARES] += fold_lanes(jnp.add, kept * kept)


def score_tile(q_IQC: Array, k_KC: Array, w_QI: Array) -> Array:
    """Scores a tile, sum over heads of w * relu(q . k) (arXiv 2512.02556, eq. 1).

    The heads of a few queries share one product: a tile's keys are loaded for each product anew,
    which for 64 rows lasts as long as the product itself. The loop is unrolled, so that a product
    overlaps the sums of the one before.

    Args:
      q_IQC: the queries of all heads.
      k_KC: the keys.
      w_QI: the heads' weights; further columns are ignored.

    Returns: scores_QK, float32.
    """
    I, Q, C = q_IQC.shape
    divisors = (count for count in range(1, I + 1) if I % count == 0)
    shared = max(count for count in divisors if count == 1 or count * Q <= PRODUCT_ROWS)
    total_QK = jnp.zeros((Q, k_KC.shape[0]), F32)
    for first in range(0, I, shared):
        relu_RK = jnp.maximum(dot(q_IQC[first : first + shared].reshape(-1, C), k_KC, (1, 1)), 0.0)
        for at, head in enumerate(range(first, first + shared)):
            total_QK += relu_RK[at * Q : (at + 1) * Q] * w_QI[:, head : head + 1]
    return total_QK


def _select_rows(scores_ref, stats_ref, bits_ref, rows, stop, keys: int, topk: int) -> Array:
    """Selects the keys of ROWS queries and writes their bits.

    Args:
      scores_ref, stats_ref, bits_ref: see `_kernel`.
      rows: which of the block's queries.
      stop: the position after the last key that they may see.
      keys: the keys of a tile.
      topk: how many keys to select.

    Returns: their thresholds [ROWS, 1].
    """
    blocks = lax.div(stop + KEYS - 1, KEYS)  # of KEYS keys

    @pl.loop(lax.div(stop, keys), blocks * (KEYS // keys))
    def _fill_unscored(tile):
        scores_ref[_tile_index(tile, keys, rows)] = jnp.full((ROWS, keys), -jnp.inf)

    count = functools.partial(_count, scores_ref, rows, blocks)
    num_allowed = count(lambda x, _: x > -jnp.inf)
    takes_all = num_allowed <= topk
    low = jnp.where(takes_all, 0.0, jnp.min(stats_ref[LEAST, rows], axis=1, keepdims=True))
    high = jnp.where(takes_all, 0.0, jnp.max(stats_ref[LARGEST, rows], axis=1, keepdims=True))
    total, squares = (
        jnp.sum(stats_ref[which, rows], axis=1, keepdims=True) for which in (TOTAL, SQUARES)
    )
    guess = normal_quantile(total, squares, num_allowed, topk)
    threshold, at_threshold, above = find_threshold(
        lambda level: count(lambda x, _: x >= level), num_allowed, takes_all, low, high, guess, topk
    )
    level = jnp.where(takes_all, jnp.finfo(F32).min, threshold)
    tied = ~takes_all & (at_threshold > topk)  # rows whose scores tie at the threshold
    any_tied = jnp.max(tied.astype(jnp.int32)) > 0
    write = functools.partial(_write_bits, scores_ref, bits_ref, rows, blocks)

    @pl.when(~any_tied)
    def _write_without_ties():
        write(lambda x, _: x >= level)

    @pl.when(any_tied)
    def _write_with_ties():
        def tied_before(position):
            return count(lambda x, first: (x == level) & (_positions(x, first) < position))

        bits = position_bits(BITS * bits_ref.shape[2])
        last = jnp.where(tied, nth_position(tied_before, topk - above, bits), stop)
        write(lambda x, first: (x > level) | ((x == level) & (_positions(x, first) <= last)))

    return jnp.where(takes_all, -jnp.inf, level)


def _positions(x: Array, first: Array) -> Array:
    """Returns the positions of neighbouring keys, of which the first stands at `first`."""
    return first + lax.broadcasted_iota(jnp.int32, x.shape, 1)


def _count(scores_ref, rows, blocks, test: Callable[[Array, Array], Array]) -> Array:
    """Counts the scores of each row that pass `test(scores, position of the first)`: [ROWS, 1].

    A step takes KEYS of them: a shorter loop would be mostly its own overhead.
    """

    def add_block(block, found):
        parts = [
            jnp.where(test(x, block * KEYS + place * LANES), 1, 0)
            for place, x in enumerate(jnp.split(scores_ref[block, rows], BITS, axis=1))
        ]
        return found + fold_pairwise(jnp.add, parts)

    found = lax.fori_loop(0, blocks, add_block, jnp.zeros((ROWS, LANES), jnp.int32))
    return jnp.sum(found, axis=1, keepdims=True)


def _write_bits(scores_ref, bits_ref, rows, blocks, test: Callable[[Array, Array], Array]) -> None:
    """Writes the bits of the keys whose scores pass `test(scores, position of the first)`."""

    @pl.loop(0, bits_ref.shape[2] // LANES)
    def _write_block(block):
        where = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)

        @pl.when(block < blocks)
        def _():
            bits = jnp.zeros((ROWS, LANES), jnp.int32)
            for place, x in enumerate(jnp.split(scores_ref[block, rows], BITS, axis=1)):
                bits |= jnp.where(test(x, block * KEYS + place * LANES), bit(place), 0)
            bits_ref[0, rows, where] = bits

        @pl.when(block >= blocks)
        def _():
            bits_ref[0, rows, where] = jnp.zeros((ROWS, LANES), jnp.int32)
