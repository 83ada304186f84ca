"""The selection kernel selects what the reference does, and bitmasks keep what they are given.

The kernel runs in Pallas' TPU interpreter, which fills memory with NaN and watches for races.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.passes import KINDS, passes
from kernels.bitmask import (
    KEYS,
    causal_bits,
    count_keys,
    next_nonempty,
    nonempty_tiles,
    num_words,
    pack,
    tile_bias,
    unpack,
)
from kernels.reference import indexer_scores, select_topk
from kernels.selection import BLOCK, select_reference, select_tpu
from kernels.threshold import GUESSES
from tests.interpreter import STRICT

pytestmark = pytest.mark.usefixtures("no_races")


def inputs(B: int, T: int, I: int, C: int, dtype=jnp.float32, segments: int = 1, seed: int = 0):
    """Makes the indexer's q, k and w, and rows of several segments with padding at both ends.

    They are integers, so that scores tie and are exact in whatever order they are summed.
    """
    rng = np.random.default_rng(seed)
    q_BTIC, k_BSC, w_BTI = (
        jnp.asarray(rng.integers(-3, 4, shape), dtype)
        for shape in ((B, T, I, C), (B, T, C), (B, T, I))
    )
    segments_BT = (
        np.sort(rng.integers(0, segments + 1, (B, T)), axis=1)
        if segments > 1
        else np.ones((B, T), int)
    )
    segments_BT[:, -T // 20 :] = 0
    return q_BTIC, k_BSC, w_BTI.astype(jnp.float32), jnp.asarray(segments_BT, jnp.int32)


def scored(q_BTIC, k_BSC, w_BTI, segments_BT):
    """Returns scores_BTS and allowed_BTS."""
    place = jnp.arange(segments_BT.shape[1])
    allowed_BTS = (
        (place[:, None] >= place)
        & (segments_BT[:, :, None] == segments_BT[:, None])
        & (segments_BT[:, :, None] > 0)
    )
    return indexer_scores(q_BTIC, k_BSC, w_BTI), allowed_BTS


def expected(*made_and_topk):
    *made, topk = made_and_topk
    return select_topk(*scored(*made), topk)


def select(kind, made, topk: int, **options):
    """Returns the selection as bool and the thresholds of whole sequences."""
    q_BTIC, k_BSC, w_BTI, segments_BT = made
    bits_BTW, threshold_BT = kind(
        q_BTIC,
        k_BSC,
        w_BTI,
        segments_BT,
        segments_BT,
        jnp.arange(segments_BT.shape[1]),
        topk,
        **options,
    )
    assert not np.any(unpack(bits_BTW, bits_BTW.shape[-1] * 32)[..., k_BSC.shape[1] :]), (
        "nothing beyond the last key"
    )
    return unpack(bits_BTW, k_BSC.shape[1]), threshold_BT


def assert_bounds(threshold_BT, selected_BTS, made, topk: int):
    """All allowed keys above the threshold are selected, none below; where all are, it is -inf."""
    scores_BTS, allowed_BTS = scored(*made)
    threshold_BT1 = np.asarray(threshold_BT)[..., None]
    assert np.all(selected_BTS[(scores_BTS > threshold_BT1) & allowed_BTS])
    assert not np.any(selected_BTS[scores_BTS < threshold_BT1])
    np.testing.assert_array_equal(threshold_BT == -np.inf, np.sum(allowed_BTS, axis=-1) <= topk)


@pytest.mark.parametrize(
    ("shape", "segments", "topk", "block"),
    [
        ((1, 150, 2, 16), 1, 17, {"queries": 32, "keys": 128}),  # not multiples of anything
        ((2, 75, 1, 8), 4, 9, {"queries": 40, "keys": 256}),  # a single head, packed rows
        ((1, 70, 8, 8), 2, 1, {}),  # k = 1, blocks as they come
        ((1, 60, 3, 8), 1, 100, {"queries": 8, "keys": 512}),  # k beyond every row
        ((1, 4_200, 1, 8), 2, 64, {"queries": 1_056, "keys": 4_096}),  # two blocks of words
    ],
    ids=["odd", "packed", "k 1", "k > T", "words"],
)
def test_the_kernel_selects_what_the_reference_does(shape, segments, topk, block):
    made = inputs(*shape, segments=segments)
    T = shape[1]
    # The watchful interpreter would take minutes for thousands of keys.
    selected_BTS, threshold_BT = select(
        select_tpu, made, topk, interpret=STRICT if T <= 300 else True, **block
    )
    np.testing.assert_array_equal(selected_BTS, expected(*made, topk))
    assert_bounds(threshold_BT, selected_BTS, made, topk)


def test_bfloat16_and_scores_that_do_not_tie():
    rng = np.random.default_rng(0)
    q_BTIC, k_BSC, w_BTI = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, 96, 4, 16), (1, 96, 16), (1, 96, 4))
    )
    made = q_BTIC, k_BSC, w_BTI.astype(jnp.float32), jnp.ones((1, 96), jnp.int32)
    np.testing.assert_array_equal(
        select(select_tpu, made, 20, interpret=STRICT, keys=128)[0], expected(*made, 20)
    )


@pytest.mark.parametrize("queries", [64, 77, 512])
def test_the_reference_in_chunks_is_the_whole(queries):
    made = inputs(2, 200, 2, 8, segments=3)
    selected_BTS, threshold_BT = select(select_reference, made, 20, queries=queries)
    np.testing.assert_array_equal(selected_BTS, expected(*made, 20))
    assert_bounds(threshold_BT, selected_BTS, made, 20)


@pytest.mark.parametrize(
    "kind",
    [functools.partial(select_tpu, interpret=True), select_reference],
    ids=["kernel", "reference"],
)
def test_every_other_block_of_queries(kind):
    """Two devices have every other block each."""
    made = inputs(2, 4 * BLOCK, 1, 8, segments=3)
    q_BTIC, k_BSC, w_BTI, segments_BT = made
    whole_BTS = select(kind, made, 20)[0]
    for query_index_T in jnp.arange(4 * BLOCK).reshape(2, 2, BLOCK).swapaxes(0, 1).reshape(2, -1):
        bits_BTW, _ = kind(
            q_BTIC[:, query_index_T],
            k_BSC,
            w_BTI[:, query_index_T],
            segments_BT[:, query_index_T],
            segments_BT,
            query_index_T,
            20,
        )
        np.testing.assert_array_equal(unpack(bits_BTW, 4 * BLOCK), whole_BTS[:, query_index_T])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("L", [8_192, 32_768, 131_072])
@pytest.mark.parametrize("kind", KINDS)
def test_few_passes_find_the_threshold(kind, L, seed):
    """The threshold is that of the 2,048 best; settling a float bit by bit would take 32 passes.
    Where fewer scores are not zero, the threshold is zero.
    """
    scores = KINDS[kind](np.random.default_rng(1_000 + seed), L).astype(np.float32)
    threshold, at, tried = passes(scores, 2_048)
    best = np.sort(scores, axis=1)[:, -2_048:][:, :1]
    np.testing.assert_array_equal(at, np.sum(scores >= best, axis=1, keepdims=True))
    np.testing.assert_array_equal(np.sum(scores >= threshold, axis=1, keepdims=True), at)
    assert tried <= {"weighted": 16, "heavy": 17, "empty": 4}[kind]


@pytest.mark.parametrize(
    "kind", ["all the same", "heavy tails", "both infinities' neighbours", "a step"]
)
def test_it_ends_whatever_the_scores(kind):
    rng = np.random.default_rng(0)
    scores = {
        "all the same": np.full((8, 64), -3.0),
        "heavy tails": np.exp(20 * rng.normal(size=(8, 64))) * rng.choice([-1, 1], (8, 64)),
        "both infinities' neighbours": rng.choice([-3.4e38, 3.4e38], (8, 64)),
        "a step": np.repeat([[1e-30, 1.0]], 32, axis=1).repeat(8, axis=0),
    }[kind].astype(np.float32)
    threshold, at, tried = passes(scores, 32)
    best = np.sort(scores, axis=1)[:, -32:]
    assert np.all((threshold > np.sort(scores, axis=1)[:, -33:-32]) | (threshold == best[:, :1])), (
        "between the last selected and the first not, or at a tie"
    )
    np.testing.assert_array_equal(at, np.sum(scores >= threshold, axis=1, keepdims=True))
    assert tried <= GUESSES + 33


def test_a_bitmask_unpacks_to_what_was_packed():
    selected_BTS = np.random.default_rng(0).random((2, 3, KEYS + 130)) < 0.5
    bits_BTW = pack(jnp.asarray(selected_BTS))
    assert bits_BTW.shape == (2, 3, num_words(KEYS + 130)) and bits_BTW.dtype == jnp.int32
    np.testing.assert_array_equal(unpack(bits_BTW, KEYS + 130), selected_BTS)


def test_the_causal_bitmask_has_every_key_a_query_may_see():
    made = inputs(2, 200, 1, 4, segments=3)
    _, allowed_BTS = scored(*made)
    bits_BTW = causal_bits(made[3], jnp.arange(200), made[3])
    np.testing.assert_array_equal(
        unpack(bits_BTW, KEYS), jnp.pad(allowed_BTS, [(0, 0), (0, 0), (0, KEYS - 200)])
    )
    np.testing.assert_array_equal(count_keys(bits_BTW), jnp.sum(allowed_BTS, axis=-1))


@pytest.mark.parametrize("keys", [128, 512, 4_096])
def test_tiles_are_nonempty_where_a_query_has_a_key(keys):
    rng = np.random.default_rng(1)
    selected_BTS = (rng.random((1, 32, 2 * KEYS)) < 0.001) & (rng.random((1, 32, 1)) < 0.3)
    bits_BTW = pack(jnp.asarray(selected_BTS))
    by_tile_BnmQK = selected_BTS.reshape(1, 4, 8, -1, keys).swapaxes(2, 3)
    nonempty_Bnm = nonempty_tiles(bits_BTW, 8, keys)
    np.testing.assert_array_equal(nonempty_Bnm, by_tile_BnmQK.any(axis=(3, 4)))
    assert not np.all(nonempty_Bnm)
    biased = jax.jit(functools.partial(tile_bias, keys=keys))
    for tile in range(2 * KEYS // keys):
        first = tile * keys // KEYS * 128
        np.testing.assert_array_equal(
            biased(bits_BTW[0, :, first : first + 128], tile) == 0,
            selected_BTS[0, :, tile * keys : (tile + 1) * keys],
        )


def test_only_nonempty_tiles_are_fetched():
    nonempty_Bnm = jnp.asarray([[[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]], bool)
    np.testing.assert_array_equal(
        next_nonempty(nonempty_Bnm), [[[1, 1, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0], [0, 5, 5, 5, 5, 5]]]
    )
