"""A block-sparse bitmask: the keys that each query attends to, 32 keys in a word of int32.

Selection hands it to attention and to the indexer's loss.

    key s is bit (s // 128) % 32 of word (s // 4096) * 128 + s % 128

128 neighbouring keys are one bit of 128 neighbouring words, so a kernel unpacks them without moving
anything between lanes. A row of S keys takes W = 128 * ceil(S / 4096) words; at 128K keys the mask
of a sequence is 2 GiB, where one of bytes would be 16.

Letters: W words, w blocks of 128 words (4096 keys), b the 32 bits of a word, L the 128 words of a
block, n tiles of queries, m tiles of keys.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels.reference import MASKED

LANES, BITS = 128, 32
KEYS = LANES * BITS  # the keys of 128 neighbouring words


def num_words(keys: int) -> int:
    """Returns W, how many words a row of so many keys takes."""
    return -(-keys // KEYS) * LANES


def pack(selected_BTS: Array) -> Array:
    """Packs a bool mask, of any leading axes, into bits_BTW."""
    *rows, S = selected_BTS.shape
    padded = jnp.pad(selected_BTS, [(0, 0)] * len(rows) + [(0, -S % KEYS)]).reshape(
        *rows, -1, BITS, LANES
    )
    bit_b1 = jnp.left_shift(jnp.int32(1), jnp.arange(BITS, dtype=jnp.int32))[:, None]
    return jnp.sum(jnp.where(padded, bit_b1, 0), axis=-2, dtype=jnp.int32).reshape(*rows, -1)


def unpack(bits_BTW: Array, keys: int) -> Array:
    """Unpacks the first `keys` keys into a bool mask [B, T, keys]."""
    *rows, W = bits_BTW.shape
    place_b1 = jnp.arange(BITS, dtype=jnp.int32)[:, None]
    bits_BTwbL = jnp.right_shift(bits_BTW.reshape(*rows, W // LANES, 1, LANES), place_b1) & 1
    return bits_BTwbL.reshape(*rows, -1)[..., :keys] == 1


def keys_on_host(bits_RW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row, key) of every bit that is set, by numpy: in the order of rows, then of keys."""
    row_N, word_N = np.nonzero(bits_RW)
    octets_N4 = bits_RW[row_N, word_N].astype("<i4").view(np.uint8).reshape(-1, BITS // 8)
    word, place = np.nonzero(np.unpackbits(octets_N4, axis=1, bitorder="little"))
    keys = bits_RW.shape[1] * BITS
    key_N = word_N // LANES * KEYS + word_N % LANES
    return np.divmod(np.sort(row_N[word] * keys + key_N[word] + place * LANES), keys)


def pack_on_host(row: np.ndarray, key: np.ndarray, rows: int, keys: int) -> np.ndarray:
    """Returns the bitmask [rows, W] in which the key of each of some rows is set, by numpy."""
    bits_RW = np.zeros((rows, num_words(keys)), np.uint32)
    place = (key // LANES % BITS).astype(np.uint32)
    np.bitwise_or.at(bits_RW, (row, key // KEYS * LANES + key % LANES), np.uint32(1) << place)
    return bits_RW.view(np.int32)


def causal_bits(query_segments_BT: Array, query_index_T: Array, key_segments_BS: Array) -> Array:
    """Makes the bitmask of causal attention inside segments.

    Args:
      query_segments_BT: the segments of the queries. A query of segment 0, padding, attends to
        nothing.
      query_index_T: where each query stands in the row, whose keys stand at 0 .. S - 1.
      key_segments_BS: the segments of the keys.

    Returns: bits_BTW of the keys of each query's own segment up to itself.
    """
    B, S = key_segments_BS.shape
    key_segment_BwbL = jnp.pad(key_segments_BS, [(0, 0), (0, -S % KEYS)]).reshape(
        B, -1, BITS, LANES
    )
    word_W, segment_BT1 = jnp.arange(num_words(S), dtype=jnp.int32), query_segments_BT[..., None]
    first_W = word_W // LANES * KEYS + word_W % LANES  # the key of each word's lowest bit
    bits_BTW = jnp.zeros((*query_segments_BT.shape, num_words(S)), jnp.int32)
    # A sum over an axis of bits would be as short, but its result would be written twice: once in
    # that axis' layout.
    for place in range(BITS):
        allowed_BTW = (
            (first_W + place * LANES <= query_index_T[:, None])
            & (segment_BT1 == key_segment_BwbL[:, :, place].reshape(B, 1, -1))
            & (segment_BT1 > 0)
        )
        bits_BTW |= jnp.where(allowed_BTW, bit(place), 0)
    return bits_BTW


def count_keys(bits_BTW: Array) -> Array:
    """Counts the keys of each query: [B, T] int32."""
    return jnp.sum(lax.population_count(bits_BTW), axis=-1)


def transpose_bits(x: Array, axis: int) -> Array:
    """Transposes 32 words of 32 bits along an axis.

    Bit i of element p becomes bit p of element i: halves change places, then quarters, then eighths
    and so on.
    """
    x = jnp.moveaxis(x, axis, -1)
    for half, mask in (
        (16, 0x0000FFFF),
        (8, 0x00FF00FF),
        (4, 0x0F0F0F0F),
        (2, 0x33333333),
        (1, 0x55555555),
    ):
        pairs = x.reshape(*x.shape[:-1], BITS // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        other = (lax.shift_right_logical(low, jnp.full(low.shape, half, jnp.int32)) ^ high) & mask
        x = jnp.stack([low ^ jnp.left_shift(other, half), high ^ other], axis=-2).reshape(x.shape)
    return jnp.moveaxis(x, -1, axis)


def along_keys(bits_BTW: Array) -> Array:
    """Rearranges a bitmask so that a word has 32 neighbouring keys, and queries come last.

    Returns: int32 [B, W, T]; key s of query t is bit s % 32 of [b, s / 32, t].
    """
    B, T, W = bits_BTW.shape
    # A block's 128 words are 4 groups of 32. Bit i of the 32 words are 32 neighbouring keys:
    # transposed, they are the bits of word i.
    keys_BTwgi = transpose_bits(bits_BTW.reshape(B, T, W // LANES, LANES // BITS, BITS), -1)
    return jnp.transpose(keys_BTwgi, (0, 2, 4, 3, 1)).reshape(B, W, T)


def along_queries(bits_BTW: Array) -> Array:
    """Rearranges a bitmask so that a word has 32 neighbouring queries, and keys come last.

    Args:
      bits_BTW: T is a multiple of 32.

    Returns: int32 [B, T / 32, W * 32]; key s of query t is bit t % 32 of [b, t / 32, s].
    """
    B, T, W = bits_BTW.shape
    queries_BtiwL = transpose_bits(bits_BTW.reshape(B, T // BITS, BITS, W // LANES, LANES), 2)
    return jnp.swapaxes(queries_BtiwL, 2, 3).reshape(B, T // BITS, W * BITS)


def nonempty_tiles(bits_BTW: Array, queries: int, keys: int) -> Array:
    """Finds the tiles in which any query attends to any key: bool [B, T / queries, 32 W / keys].

    Args:
      bits_BTW: the bitmask.
      queries: the queries of a tile, a divisor of T.
      keys: the keys of a tile: 128, 256, ..., or 4096.
    """
    B, T, W = bits_BTW.shape
    bits_per_tile = keys // LANES  # of a word, those whose keys lie in one tile
    any_BnwL = lax.reduce_or(bits_BTW.reshape(B, T // queries, queries, W), (2,)).reshape(
        B, T // queries, W // LANES, LANES
    )
    any_Bnw = lax.reduce_or(any_BnwL, (3,))
    first_p = jnp.arange(BITS // bits_per_tile, dtype=jnp.int32) * bits_per_tile
    shifted_Bnwp = lax.shift_right_logical(
        any_Bnw[..., None], jnp.broadcast_to(first_p, (*any_Bnw.shape, BITS // bits_per_tile))
    )
    tile_bits = jnp.int32(-1 if bits_per_tile == BITS else (1 << bits_per_tile) - 1)
    return ((shifted_Bnwp & tile_bits) != 0).reshape(B, T // queries, -1)


def next_nonempty(nonempty_Bnm: Array) -> Array:
    """Returns which tile a pipeline fetches at each tile, so that it fetches no empty one.

    It is the first nonempty tile from there on, [B, n, m] int32; after the last nonempty tile it
    is that one again, which is not fetched twice.
    """
    tiles = nonempty_Bnm.shape[-1]
    place_Bnm = jnp.where(nonempty_Bnm, jnp.arange(tiles, dtype=jnp.int32), tiles)
    after_Bnm = lax.cummin(place_Bnm, axis=2, reverse=True)
    last_Bn1 = jnp.max(
        jnp.where(nonempty_Bnm, jnp.arange(tiles, dtype=jnp.int32), 0), axis=2, keepdims=True
    )
    return jnp.where(after_Bnm == tiles, last_Bn1, after_Bnm)


def bit(place: int) -> Array:
    """Returns an int32 with one bit set; bit 31 is the sign."""
    return jnp.int32(-(2**31) if place == BITS - 1 else 1 << place)


def tile_bias(bits_QL: Array, tile: Array, keys: int) -> Array:
    """Unpacks a tile inside a kernel: 0 for the keys in the mask, MASKED for the others.

    Args:
      bits_QL: for each query the 128 words that the tile lies in.
      tile: the tile's number in the sequence.
      keys: the keys of a tile.

    Returns: float32 [Q, keys].
    """
    places = keys // LANES
    first = lax.rem(tile, BITS // places) * places
    shifted_QL = lax.shift_right_logical(bits_QL, jnp.full(bits_QL.shape, first, jnp.int32))
    return jnp.concatenate(
        [jnp.where((shifted_QL & bit(place)) != 0, 0.0, MASKED) for place in range(places)], axis=1
    )
