"""The best-scored keys of each query, found exactly and without a sort: the threshold of the k
best, by counting.

The indexer's scores [T, S] never leave the chip. A block of queries scores every key before it into
VMEM; then, eight queries at a time, a bound is moved until exactly k scores are at or above it. One
pass over a row counts; the counts so far tell where the next bound goes (regula falsi on their
logarithms, in its Illinois variant, begun at the quantile of a normal distribution), so a dozen
passes do, where settling a float bit by bit takes 32. It ends whatever the scores
are: after GUESSES bounds the float's bits are halved. Of equal scores the earlier key goes first,
as in the reference, model/layers/indexer.py: select_topk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import BITS, KEYS, LANES, bit, pack, words
from kernels.reference import indexer_scores, select_topk
from kernels.tiles import F32, dot, fold_lanes, fold_pairwise, padded

BLOCK = 128  # queries that stand side by side, wherever the next ones stand
ROWS = 8  # queries whose bounds move together: the sublanes of a register
GUESSES = 24  # bounds put where the counts lead, before bits are halved
ZERO = 3  # bounds before the one that asks whether the threshold is a relu's zero
# the bits of the least float above zero: what would lie between, a TPU takes for zero
TINY = 0x00800000
SCORES_BYTES = 32 * 2**20  # of VMEM for a block's scores: half of what the smallest chips have
TILE = 2**16  # pairs of a query and a key that are scored at a time
# queries, of one head or several, that the matrix units multiply with a tile's keys once those are
# loaded
PRODUCT = 512


def select_reference(
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    segments_BT: Array,
    key_segments_BS: Array,
    place_T: Array,
    topk: int,
    *,
    queries: int = 512,
) -> tuple[Array, Array]:
    """See `select_tpu`. So many queries at a time; the threshold is read off the selection."""
    (B, T), S = segments_BT.shape, k_BSC.shape[1]
    chunk = min(queries, T)

    def cut(x_BT, axis=1):
        x_BT = padded(x_BT, axis, -(-T // chunk) * chunk)
        return jnp.moveaxis(
            x_BT.reshape(*x_BT.shape[:axis], -1, chunk, *x_BT.shape[axis + 1 :]), axis, 0
        )

    def step(piece):
        q_BCIC, w_BCI, own_BC1, place_C1 = *piece[:2], *(x[..., None] for x in piece[2:])
        allowed_BCS = (
            (jnp.arange(S) <= place_C1) & (own_BC1 == key_segments_BS[:, None]) & (own_BC1 > 0)
        )
        scores_BCS = indexer_scores(q_BCIC, k_BSC, w_BCI)
        among_BCS = select_topk(scores_BCS, allowed_BCS, topk)
        all_BC = jnp.sum(allowed_BCS, axis=-1) <= topk
        return pack(among_BCS), jnp.where(
            all_BC, -jnp.inf, jnp.min(jnp.where(among_BCS, scores_BCS, jnp.inf), axis=-1)
        )

    bits_nBCW, threshold_nBC = lax.map(
        step, (cut(q_BTIC), cut(w_BTI), cut(segments_BT), cut(place_T, axis=0))
    )
    return jnp.moveaxis(bits_nBCW, 0, 1).reshape(B, -1, words(S))[:, :T], jnp.moveaxis(
        threshold_nBC, 0, 1
    ).reshape(B, -1)[:, :T]


def select_tpu(
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    segments_BT: Array,
    key_segments_BS: Array,
    place_T: Array,
    topk: int,
    *,
    queries: int = 0,
    keys: int = 0,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """The kernel.

    Args:
      q_BTIC, w_BTI: the indexer's queries and the weights of their heads, see `indexer_scores`.
      k_BSC: its keys, of the whole sequence.
      segments_BT, key_segments_BS: a query may choose keys of its own segment up to itself; a query
        of segment 0 none.
      place_T: where in the sequence each query stands. BLOCK by BLOCK they stand side by side.
      queries: of a block: a divisor of BLOCK and a multiple of 8, or, for one block, of any size; 0
        for as many as SCORES_BYTES allow, at most BLOCK.
      keys: of a tile: 128, 256, ..., 4096; 0 for as many as TILE allows.

    Returns:
      bits_BTW: the min(topk, allowed) best-scored allowed keys of each query. Of equal scores the
        earlier key goes first.
      threshold_BT: float32; every allowed key of a higher score is chosen, none of a lower one.
        -inf where all allowed keys are.
    How many they are, `keyset.sizes` counts; a list of them is `decode_selection.listed` of
    `keyset.unpack`.
    """
    (B, T, I, C), S = q_BTIC.shape, k_BSC.shape[1]
    W = words(S)
    queries = queries or min(most_queries(S), -(-T // ROWS) * ROWS)
    keys = keys or most_keys(queries)
    nq, nk = -(-T // queries), -(-S // keys)
    # A query's segment stands behind its weights: a column of its own would fill 128 lanes. As a
    # float it is exact up to 2^24.
    w_BTJ = jnp.concatenate([w_BTI.astype(F32), segments_BT[..., None].astype(F32)], axis=-1)

    def fetched(i, j, first_ref):
        return jnp.minimum(
            jnp.minimum(j, lax.div(first_ref[i] + queries - 1, keys)), nk - 1
        )  # not what no query of the block may see

    bits_BTW, threshold_Bn1Q = pl.pallas_call(
        functools.partial(_kernel, heads=I, topk=topk, tiles=nk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, nq, nk),
            in_specs=[
                pl.BlockSpec((1, I, queries, C), lambda b, i, j, _: (b, 0, i, 0)),
                pl.BlockSpec((1, queries, I + 1), lambda b, i, j, _: (b, i, 0)),
                pl.BlockSpec(
                    (1, keys, C), lambda b, i, j, first_ref: (b, fetched(i, j, first_ref), 0)
                ),
                pl.BlockSpec(
                    (1, 1, keys), lambda b, i, j, first_ref: (b, 0, fetched(i, j, first_ref))
                ),
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
        padded(place_T, 0, nq * queries)[::queries].astype(jnp.int32),
        padded(jnp.swapaxes(q_BTIC, 1, 2), 2, nq * queries),
        padded(w_BTJ, 1, nq * queries),
        padded(k_BSC, 1, nk * keys),
        padded(key_segments_BS, 1, nk * keys).astype(F32)[:, None],
    )
    return bits_BTW[:, :T], threshold_Bn1Q.reshape(B, -1)[:, :T]


def most_queries(S: int) -> int:
    """Of a block, before a row of so many keys: the power of two that SCORES_BYTES allow."""
    return min(BLOCK, max(_power_of_two(SCORES_BYTES // (4 * BITS * words(S))), ROWS))


def most_keys(queries: int) -> int:
    """Of a tile of so many queries: the power of two that TILE allows."""
    return min(KEYS, max(_power_of_two(TILE // queries), LANES))


def _power_of_two(most: int) -> int:
    """The largest up to `most`."""
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
    seen_ref,
    *,
    heads: int,
    topk: int,
    tiles: int,
):
    """
    first_ref [blocks]: where in the sequence each block's first query stands.
    scores_ref [words, queries, KEYS]: a block's scores, -inf where not allowed.
    seen_ref [4, queries, 128]: their largest, least, sum and sum of squares, lane by lane.
    """
    j, first = pl.program_id(2), first_ref[pl.program_id(1)]
    queries, keys = scores_ref.shape[1], k_ref.shape[1]
    live = jnp.minimum(
        lax.div(first + queries - 1, keys) + 1, tiles
    )  # tiles that any of these queries may see

    @pl.when(j == 0)
    def _():
        for which, first in enumerate((-jnp.inf, jnp.inf, 0.0, 0.0)):
            seen_ref[which] = jnp.full((queries, LANES), first, F32)

    @pl.when(j < live)
    def _():
        scores = score_tile(q_ref[0], k_ref[0], w_ref[0])
        query = first + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        key = j * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        own = w_ref[0, :, heads : heads + 1]
        allowed = (key <= query) & (own == segments_ref[0]) & (own > 0)
        per = KEYS // keys
        scores_ref[
            lax.div(j, per), :, pl.ds(pl.multiple_of(lax.rem(j, per) * keys, LANES), keys)
        ] = jnp.where(allowed, scores, -jnp.inf)
        kept = jnp.where(allowed, scores, 0.0)
        seen_ref[0] = jnp.maximum(
            seen_ref[0], fold_lanes(jnp.maximum, jnp.where(allowed, scores, -jnp.inf))
        )
        seen_ref[1] = jnp.minimum(
            seen_ref[1], fold_lanes(jnp.minimum, jnp.where(allowed, scores, jnp.inf))
        )
        seen_ref[2] += fold_lanes(jnp.add, kept)
        seen_ref[3] += fold_lanes(jnp.add, kept * kept)

    @pl.when(j == tiles - 1)
    def _():
        @pl.loop(0, queries // ROWS)
        def _(group):
            rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)
            seen_ref[0, rows] = jnp.broadcast_to(
                _select_rows(scores_ref, seen_ref, bits_ref, rows, live * keys, keys, topk),
                (ROWS, LANES),
            )

        threshold_ref[0, 0] = seen_ref[0].T[:1]


def score_tile(q_IQC: Array, k_KC: Array, w_QI: Array) -> Array:
    """sum over heads of w * relu(q . k): [Q, K] float32 (arXiv 2512.02556, eq. 1). Of w the first
    columns are the heads'.

    The heads of a few queries take part in one product: a tile's keys are loaded for each product
    anew, which for 64 rows lasts as long as the product itself.
    Unrolled: a product overlaps the sums of the one before.
    """
    I, Q, C = q_IQC.shape
    together = max(
        count
        for count in range(1, I + 1)
        if count == 1 or (I % count == 0 and count * Q <= PRODUCT)
    )
    total_QK = jnp.zeros((Q, k_KC.shape[0]), F32)
    for first in range(0, I, together):
        relu_RK = jnp.maximum(
            dot(q_IQC[first : first + together].reshape(-1, C), k_KC, (1, 1)), 0.0
        )
        for at, head in enumerate(range(first, first + together)):
            total_QK += relu_RK[at * Q : (at + 1) * Q] * w_QI[:, head : head + 1]
    return total_QK


def _select_rows(scores_ref, seen_ref, bits_ref, rows, stop, keys: int, topk: int) -> Array:
    """Writes the bits of ROWS queries, whose keys end before `stop`; returns their thresholds
    [ROWS, 1].
    """
    words = lax.div(stop + KEYS - 1, KEYS)  # blocks of KEYS

    @pl.loop(lax.div(stop, keys), words * (KEYS // keys))  # what no tile has filled
    def _(tile):
        per = KEYS // keys
        scores_ref[
            lax.div(tile, per), rows, pl.ds(pl.multiple_of(lax.rem(tile, per) * keys, LANES), keys)
        ] = jnp.full((ROWS, keys), -jnp.inf)

    def count(chosen) -> Array:
        """How many scores of each row are `chosen(scores, first key)`: [ROWS, 1]. KEYS at a time: a
        shorter loop would be mostly its own overhead.
        """

        def one(word, found):
            pieces = jnp.split(scores_ref[word, rows], BITS, axis=1)
            parts = [
                jnp.where(chosen(x, word * KEYS + place * LANES), 1, 0)
                for place, x in enumerate(pieces)
            ]
            return found + fold_pairwise(jnp.add, parts)

        return jnp.sum(
            lax.fori_loop(0, words, one, jnp.zeros((ROWS, LANES), jnp.int32)), axis=1, keepdims=True
        )

    allowed = count(lambda x, _: x > -jnp.inf)
    few = allowed <= topk
    low = jnp.where(few, 0.0, jnp.min(seen_ref[1, rows], axis=1, keepdims=True))
    high = jnp.where(few, 0.0, jnp.max(seen_ref[0, rows], axis=1, keepdims=True))
    total, squares = (jnp.sum(seen_ref[which, rows], axis=1, keepdims=True) for which in (2, 3))
    low, at_low, above = find_threshold(
        count, allowed, few, low, high, normal_quantile(total, squares, allowed, topk), topk
    )
    level = jnp.where(few, jnp.finfo(F32).min, low)
    crowded = ~few & (at_low > topk)  # where more are at or above, these tie
    some_crowded = jnp.max(crowded.astype(jnp.int32)) > 0

    def write(chosen):
        @pl.loop(0, bits_ref.shape[2] // LANES)
        def _(word):
            where = pl.ds(pl.multiple_of(word * LANES, LANES), LANES)

            @pl.when(word < words)
            def _():
                bits = jnp.zeros((ROWS, LANES), jnp.int32)
                for place, x in enumerate(jnp.split(scores_ref[word, rows], BITS, axis=1)):
                    bits |= jnp.where(chosen(x, word * KEYS + place * LANES), bit(place), 0)
                bits_ref[0, rows, where] = bits

            @pl.when(word >= words)
            def _():
                bits_ref[0, rows, where] = jnp.zeros((ROWS, LANES), jnp.int32)

    @pl.when(~some_crowded)
    def _():
        write(lambda x, _: x >= level)

    @pl.when(some_crowded)
    def _():
        last = jnp.where(
            crowded, _last_tied(count, level, topk - above, places(BITS * bits_ref.shape[2])), stop
        )
        write(
            lambda x, first: (
                (x > level)
                | ((x == level) & (first + lax.broadcasted_iota(jnp.int32, x.shape, 1) <= last))
            )
        )

    return jnp.where(few, -jnp.inf, level)


class _Search(NamedTuple):
    """Of each row; all [ROWS, 1] int32 but the scalar `step` and the float32 `over` and `under`."""

    step: Array
    low: Array  # the bound known to have topk scores at or above it, or more, as ordered bits
    high: Array  # and one with fewer
    at_low: Array  # how many there are
    at_high: Array
    over: Array  # the logarithms of these shares of topk: what the next bound is weighed by
    under: Array
    side: Array  # which of the two moved last
    done: Array


def find_threshold(
    count, allowed: Array, done: Array, low: Array, high: Array, guess: Array, topk: int
) -> tuple[Array, Array, Array]:
    """Moves a bound for each row until `topk` scores are at or above it, or no float lies between
    one that has more and one that has fewer.

    Args: all [ROWS, 1].
      count: bounds test -> how many scores pass.
      allowed: scores there are; `done` where they are not more than topk.
      low, high: the least and the largest of them.
      guess: the first bound to try.

    Returns: the threshold, how many scores are at or above it, and how many are above where that is
    too many.
    """
    zero = jnp.zeros_like(allowed)

    def share(found: Array) -> Array:
        """Tails are near to exponential, so their logarithm to a line."""
        return jnp.log(jnp.maximum(found.astype(F32), 0.5) / topk)

    state = _Search(
        step=jnp.int32(0),
        low=ordered(low),
        high=ordered(high) + 1,
        at_low=allowed,
        at_high=zero,
        over=share(allowed),
        under=share(zero),
        side=zero,
        done=done.astype(jnp.int32),
    )

    def going(state: _Search) -> Array:
        return jnp.min(state.done) == 0

    def move(s: _Search) -> _Search:
        low, high = unordered(s.low), unordered(s.high)
        bound = ordered(
            jnp.where(s.step == 0, guess, low + (high - low) * (s.over / (s.over - s.under)))
        )
        halved = (s.low >> 1) + (s.high >> 1) + (s.low & s.high & 1)
        bound = jnp.where((bound <= s.low) | (bound >= s.high) | (s.step >= GUESSES), halved, bound)
        bound = jnp.where((s.step >= ZERO) & (s.low <= 0) & (s.high > TINY), TINY, bound)
        bound = jnp.where((s.low < 0) & (s.high == TINY), 0, bound)
        level = unordered(bound)
        found = count(lambda x, _: x >= level)
        up, down = (s.done == 0) & (found >= topk), (s.done == 0) & (found < topk)
        new_low, new_high = jnp.where(up, bound, s.low), jnp.where(down, bound, s.high)
        at_low = jnp.where(up, found, s.at_low)
        settled = (
            (at_low == topk) | (new_high - 1 <= new_low) | ((new_low == 0) & (new_high == TINY))
        )
        return _Search(
            step=s.step + 1,
            low=new_low,
            high=new_high,
            at_low=at_low,
            at_high=jnp.where(down, found, s.at_high),
            # Illinois: the side that stays twice counts half, else one side would crawl.
            over=jnp.where(up, share(found), jnp.where(down & (s.side < 0), 0.5 * s.over, s.over)),
            under=jnp.where(
                down, share(found), jnp.where(up & (s.side > 0), 0.5 * s.under, s.under)
            ),
            side=jnp.where(up, 1, jnp.where(down, -1, s.side)),
            done=jnp.where(settled, 1, s.done),
        )

    end = lax.while_loop(going, move, state)
    return unordered(end.low), end.at_low, end.at_high


def places(S: int) -> int:
    """Bits of the largest place in a row of so many keys."""
    return (S - 1).bit_length()


def _last_tied(count, level: Array, wanted: Array, places: int) -> Array:
    """The place, of so many bits, of the last of the `wanted` first keys whose score is the
    level.
    """

    def settle(step, found):
        bound = found + (jnp.int32(1) << (places - 1 - step))
        before = count(
            lambda x, first: (
                (x == level) & (first + lax.broadcasted_iota(jnp.int32, x.shape, 1) < bound)
            )
        )
        return jnp.where(before < wanted, bound, found)

    return lax.fori_loop(0, places, settle, jnp.zeros_like(wanted))


def normal_quantile(total: Array, squares: Array, allowed: Array, topk: int) -> Array:
    """Where topk of the scores, of which these are the sum, the sum of squares and the number,
    would be above if they were of a normal distribution (Abramowitz and Stegun, 26.2.23).
    """
    n = jnp.maximum(allowed, 1).astype(F32)
    mean = total / n
    variance = squares / n - mean * mean
    share = topk / n
    t = jnp.sqrt(-2 * jnp.log(jnp.clip(jnp.minimum(share, 1 - share), 1e-9, 0.5)))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (
        1 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    )
    return mean + jnp.sqrt(jnp.maximum(variance, 0.0)) * jnp.where(share < 0.5, z, -z)


def ordered(x: Array) -> Array:
    """float32 as int32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def unordered(bits: Array) -> Array:
    """The float32 of `ordered`."""
    return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), F32)
