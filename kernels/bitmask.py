"""Which keys each query attends to, a bit a key: what selection hands to attention and to the
indexer's loss.

    key s is bit (s // 128) % 32 of word (s // 4096) * 128 + s % 128

so that 128 keys side by side are one bit of 128 words side by side: a kernel unpacks them without
moving anything between lanes. A row of S keys is W = 128 * ceil(S / 4096) words of int32; at 128K
keys a sequence's whole set is 2 GiB, where a mask of bytes would be 16.
"""

import jax.numpy as jnp
from jax import Array, lax

from kernels.reference import MASKED

LANES, BITS = 128, 32
KEYS = LANES * BITS  # in LANES words side by side


def words(keys: int) -> int:
    """W of a row of so many keys."""
    return -(-keys // KEYS) * LANES


def pack(among_BTS: Array) -> Array:
    """bits_BTW of a set given as bool."""
    *rows, S = among_BTS.shape
    padded = jnp.pad(among_BTS, [(0, 0)] * len(rows) + [(0, -S % KEYS)]).reshape(
        *rows, -1, BITS, LANES
    )
    bit_b1 = jnp.left_shift(jnp.int32(1), jnp.arange(BITS, dtype=jnp.int32))[:, None]
    return jnp.sum(jnp.where(padded, bit_b1, 0), axis=-2, dtype=jnp.int32).reshape(*rows, -1)


def unpack(bits_BTW: Array, keys: int) -> Array:
    """The set as bool [B, T, keys]."""
    *rows, W = bits_BTW.shape
    place_b1 = jnp.arange(BITS, dtype=jnp.int32)[:, None]
    return (jnp.right_shift(bits_BTW.reshape(*rows, W // LANES, 1, LANES), place_b1) & 1).reshape(
        *rows, -1
    )[..., :keys] == 1


def causal(segments_BT: Array, key_segments_BS: Array, place_T: Array) -> Array:
    """bits_BTW of every key a query may attend to: those of its own segment up to itself, none for
    a query of segment 0. `place_T`: where queries stand.
    """
    B, S = key_segments_BS.shape
    segment_BwbL = jnp.pad(key_segments_BS, [(0, 0), (0, -S % KEYS)]).reshape(B, -1, BITS, LANES)
    word_W, own_BT1 = jnp.arange(words(S), dtype=jnp.int32), segments_BT[..., None]
    first_W = word_W // LANES * KEYS + word_W % LANES
    bits_BTW = jnp.zeros((*segments_BT.shape, words(S)), jnp.int32)
    for place in range(
        BITS
        # a sum over an axis of places would be as short, and its result be written twice: once in that
        # axis' layout
    ):
        allowed_BTW = (
            (first_W + place * LANES <= place_T[:, None])
            & (own_BT1 == segment_BwbL[:, :, place].reshape(B, 1, -1))
            & (own_BT1 > 0)
        )
        bits_BTW |= jnp.where(allowed_BTW, bit(place), 0)
    return bits_BTW


def counts(bits_BTW: Array) -> Array:
    """How many keys are in each query's set: [B, T] int32."""
    return jnp.sum(lax.population_count(bits_BTW), axis=-1)


def transpose_bits(x: Array, axis: int) -> Array:
    """Of int32 with 32 elements along an axis: bit i of element p is what was bit p of element i.
    Halves change places, then quarters, then eighths ...
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
    """The set with 32 keys in a word and the queries last: key s of query t is bit s % 32 of [b, s
    / 32, t]. int32 [B, W, T].
    """
    B, T, W = bits_BTW.shape
    keys_BTGQp = transpose_bits(
        bits_BTW.reshape(B, T, W // LANES, LANES // BITS, BITS), -1
    )  # before: a place p for 32 words, now a word for each place
    return jnp.transpose(keys_BTGQp, (0, 2, 4, 3, 1)).reshape(B, W, T)


def along_queries(bits_BTW: Array) -> Array:
    """The set with 32 queries in a word and the keys last: key s of query t is bit t % 32 of [b, t
    / 32, s]. T a multiple of 32; int32 [B, T / 32, W * 32].
    """
    B, T, W = bits_BTW.shape
    queries_BtpGL = transpose_bits(bits_BTW.reshape(B, T // BITS, BITS, W // LANES, LANES), 2)
    return jnp.swapaxes(queries_BtpGL, 2, 3).reshape(B, T // BITS, W * BITS)


def nonempty_tiles(bits_BTW: Array, queries: int, keys: int) -> Array:
    """Whether any query of a block has a key in a tile: bool [B, T / queries, 32 W / keys].
    `queries` divides T; `keys` is 128, 256, ..., or 4096.
    """
    B, T, W = bits_BTW.shape
    per = keys // LANES
    any_BnwL = lax.reduce_or(bits_BTW.reshape(B, T // queries, queries, W), (2,)).reshape(
        B, T // queries, W // LANES, LANES
    )
    any_Bnw = lax.reduce_or(any_BnwL, (3,))
    tile_p = jnp.arange(BITS // per, dtype=jnp.int32) * per
    shifted_Bnwp = lax.shift_right_logical(
        any_Bnw[..., None], jnp.broadcast_to(tile_p, (*any_Bnw.shape, BITS // per))
    )
    return ((shifted_Bnwp & jnp.int32(-1 if per == BITS else (1 << per) - 1)) != 0).reshape(
        B, T // queries, -1
    )


def next_nonempty(held_Bnm: Array) -> Array:
    """For each tile the first held one from it on, and behind the last held one that again, int32:
    what a pipeline fetches, none in vain.
    """
    tiles = held_Bnm.shape[-1]
    place_Bnm = jnp.where(held_Bnm, jnp.arange(tiles, dtype=jnp.int32), tiles)
    after_Bnm = lax.cummin(place_Bnm, axis=2, reverse=True)
    last_Bn1 = jnp.max(
        jnp.where(held_Bnm, jnp.arange(tiles, dtype=jnp.int32), 0), axis=2, keepdims=True
    )
    return jnp.where(after_Bnm == tiles, last_Bn1, after_Bnm)


def bit(place: int) -> Array:
    """int32 with that bit alone: the last one is the sign."""
    return jnp.int32(-(2**31) if place == BITS - 1 else 1 << place)


def tile_bias(bits_QL: Array, tile: Array, keys: int) -> Array:
    """In a kernel: 0 for the keys of a tile that are in the set, MASKED for the others, float32 [Q,
    keys]. bits_QL: the 128 words the tile is in.
    """
    per = keys // LANES
    first = lax.rem(tile, BITS // per) * per
    shifted_QL = lax.shift_right_logical(bits_QL, jnp.full(bits_QL.shape, first, jnp.int32))
    return jnp.concatenate(
        [jnp.where((shifted_QL & bit(place)) != 0, 0.0, MASKED) for place in range(per)], axis=1
    )
