"""Attention of one new token a row over the latents it selected, read one by one: absorbed decoding
(arXiv 2405.04434, section 2.1.2; arXiv 2512.02556).

    out = softmax(q c^T over the listed tokens) c[:, :value_rank]

All heads read the same latents, so a row costs what its list is long, whatever the context. On TPU
a token is tiles of its own, [n, 2, 128] with zeros behind its R channels (DeepSeek's 576 in
bfloat16: n = 3, 1,536 bytes), so that one copy fetches it from HBM. The issue of those copies
bounds the kernel. It stands unrolled in one basic block with the products of the chunk before; that
chunk has a buffer of its own, since of two halves of one the compiler cannot tell that they do not
meet; and what is listed are tiles, so that there is no address left to multiply.

| implementation | how | for |
|---|---|---|
| reference | a gather | the oracle |
| tpu | Pallas: a copy a token, two chunks in flight, the softmax over chunks as they come | TPU, from CROSSOVER slots on: `in_tiles` |
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import LANES
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, dot, padded

TILE = 2 * LANES  # channels
HEADS = 16  # their number is padded to a multiple: whole registers of bfloat16
# Slots from which fetching token by token beats reading every latent and masking most: on v6e 2,048
# copies and their list take about 7.5 us by the static schedule (bench/decode.py) and a microsecond
# until the first arrive, in which 1.64 TB/s bring 12,000 latents of 1,152 bytes. Estimated, not
# measured.
CROSSOVER = 12_288
# copies that a step of the first chunk's loop issues; there is no product yet to hide them behind
UNROLLED = 16


def in_tiles(platform: str, slots: int, topk: int) -> bool:
    """The table: (platform, size) -> whether a cache that is read sparsely is kept as tiles, for
    the kernel.
    """
    return platform == "tpu" and slots >= max(CROSSOVER, topk + 1)


def to_tiles(latent_BSR: Array) -> Array:
    """[B, S, R] as tokens' tiles [B, S, n, 2, 128]."""
    *rows, R = latent_BSR.shape
    tiles = -(-R // TILE)
    return padded(latent_BSR, len(rows), tiles * TILE).reshape(*rows, tiles, 2, LANES)


def from_tiles(tiles_BSn2L: Array, rank: int) -> Array:
    """The first `rank` channels, [B, S, rank]."""
    return tiles_BSn2L.reshape(*tiles_BSn2L.shape[:-3], -1)[..., :rank]


def decode_reference(
    q_BNR: Array, latent_BSR: Array, value_rank: int, index_Bk: Array, count_B: Array
) -> Array:
    """See `decode_tpu`; the latents as they are."""
    listed_BkR = jnp.take_along_axis(latent_BSR, index_Bk[:, :, None], axis=1)
    among_B1k = (jnp.arange(index_Bk.shape[1]) < count_B[:, None])[:, None]
    logits_BNk = jnp.where(
        among_B1k, jnp.einsum("BNR,BkR->BNk", q_BNR, listed_BkR, preferred_element_type=F32), MASKED
    )
    largest_BN1 = jnp.maximum(jnp.max(logits_BNk, axis=-1, keepdims=True), INITIAL_MAX)
    p_BNk = jnp.exp(logits_BNk - largest_BN1)
    total_BN1 = jnp.maximum(
        jnp.sum(p_BNk, axis=-1, keepdims=True), 0.5
    )  # the largest adds 1, so this acts on a row without a key alone
    mixed_BNV = jnp.einsum(
        "BNk,BkV->BNV",
        p_BNk.astype(listed_BkR.dtype),
        listed_BkR[..., :value_rank],
        preferred_element_type=F32,
    )
    return (mixed_BNV / total_BN1).astype(latent_BSR.dtype)


def decode_tpu(
    q_BNR: Array,
    tiles_BSn2L: Array,
    value_rank: int,
    index_Bk: Array,
    count_B: Array,
    *,
    keys: int = 256,
    parts: int = 1,
    interpret=False,
) -> Array:
    """The kernel.

    Args:
      q_BNR: absorbed queries, scaled.
      tiles_BSn2L: the cache, see `to_tiles`, bfloat16 or float32; it stays in HBM.
      value_rank: the first so many channels of a latent are its value.
      index_Bk: each row's tokens, none twice, in any order. All are in 0 .. S - 1, those behind the
        row's count too: whole chunks are fetched, unchecked.
      count_B: how many of them count.
      keys: of a chunk at most, a multiple of 16.
      parts: so many programs share a row's chunks: for a chip whose two cores are one device, and
        batches of few rows.

    Returns: out_BNV of the cache's dtype, zeros for a row whose count is 0.
    """
    B, N, _ = q_BNR.shape
    _, S, tiles, _, _ = tiles_BSn2L.shape
    heads, width, dtype = -(-N // HEADS) * HEADS, -(-value_rank // LANES) * LANES, tiles_BSn2L.dtype
    q_BNC = padded(padded(q_BNR, 1, heads), 2, tiles * TILE)
    keys = min(keys, -(-index_Bk.shape[1] // UNROLLED) * UNROLLED)
    # Behind a list stand its first tokens again: one token again and again would be what all those
    # copies wait for.
    index_Bk = jnp.pad(index_Bk, [(0, 0), (0, -index_Bk.shape[1] % keys)], mode="wrap")
    first_tile_B1k = ((index_Bk + jnp.arange(B, dtype=jnp.int32)[:, None] * S) * tiles)[:, None]
    block = (1, 1, heads, width)
    results = [jax.ShapeDtypeStruct((B, parts, heads, width), dtype if parts == 1 else F32)]
    results += [jax.ShapeDtypeStruct((B, parts, heads, LANES), F32)] * (parts > 1)
    out_BPNV, *lse_BPNL = pl.pallas_call(
        functools.partial(
            _kernel,
            load=_load_whole if isinstance(interpret, pltpu.InterpretParams) else _load,
            keys=keys,
            tiles=tiles,
            parts=parts,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, parts),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, first_tile_B1k.shape[2]),
                    lambda b, p, _: (b, 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec((1, heads, tiles * TILE), lambda b, p, _: (b, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec(size, lambda b, p, _: (b, p, 0, 0))
                for size in (block, (*block[:3], LANES))[: len(results)]
            ],
            scratch_shapes=[
                *(pltpu.VMEM((keys * tiles, 2, LANES), dtype) for _ in range(2)),
                pltpu.SemaphoreType.DMA((2,)),
                *(pltpu.VMEM((heads, lanes), F32) for lanes in (LANES, LANES, width)),
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="sparse_decode",
    )(count_B, first_tile_B1k, q_BNC, tiles_BSn2L.reshape(-1, 2, LANES))
    out_BNV = out_BPNV[:, 0] if parts == 1 else merge(out_BPNV, lse_BPNL[0][..., :1]).astype(dtype)
    return out_BNV[:, :N, :value_rank]


def _kernel(
    count_ref, index_ref, q_ref, tiles_ref, out_ref, *rest, load, keys: int, tiles: int, parts: int
):
    """tiles_ref [tiles of all rows, 2, 128] in HBM. A chunk is in the even buffer or the odd one,
    counted from the program's first.
    """
    *lse_ref, even_ref, odd_ref, arrived, largest_ref, total_ref, mixed_ref = rest
    chunk_refs = even_ref, odd_ref
    count = count_ref[pl.program_id(0)]
    chunks = lax.div(count + keys - 1, keys)
    each = lax.div(chunks + parts - 1, parts)
    first, stop = (jnp.minimum((pl.program_id(1) + ahead) * each, chunks) for ahead in (0, 1))
    largest_ref[...] = jnp.full(largest_ref.shape, INITIAL_MAX, F32)
    total_ref[...] = jnp.zeros(total_ref.shape, F32)
    mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)

    def fetch(chunk, place, side: int):
        tile = index_ref.at[0, 0, pl.ds(pl.multiple_of(chunk * keys, keys), keys)][place]
        into = chunk_refs[side].at[pl.ds(place * tiles, tiles)]
        pltpu.make_async_copy(tiles_ref.at[pl.ds(tile, tiles)], into, arrived.at[side]).start()

    def wait(side: int):
        """For all bytes of a chunk at once."""
        pltpu.make_async_copy(
            tiles_ref.at[pl.ds(0, keys * tiles)], chunk_refs[side], arrived.at[side]
        ).wait()

    def attend(chunk, side: int):
        latent_KC = load(chunk_refs[side], keys, tiles)
        logits_NK = dot(q_ref[0], latent_KC, (1, 1))
        place = chunk * keys + lax.broadcasted_iota(jnp.int32, logits_NK.shape, 1)
        logits_NK = jnp.where(place < count, logits_NK, MASKED)
        before_NL = largest_ref[...]
        largest_NL = jnp.maximum(before_NL, jnp.max(logits_NK, axis=1, keepdims=True))
        p_NK = jnp.exp(logits_NK - largest_NL[:, :1])
        shrink_NL = jnp.exp(before_NL - largest_NL)
        total_ref[...] = shrink_NL * total_ref[...] + jnp.sum(p_NK, axis=1, keepdims=True)
        mixed_ref[...] = mixed_ref[...] * shrink_NL[:, :1] + dot(
            p_NK.astype(latent_KC.dtype), latent_KC[:, : mixed_ref.shape[1]], (1, 0)
        )
        largest_ref[...] = largest_NL

    @pl.when(first < stop)
    def _():
        @pl.loop(0, keys // UNROLLED)
        def _(group):
            for place in range(UNROLLED):
                fetch(first, group * UNROLLED + place, 0)

    @pl.loop(first, stop)
    def _(chunk):
        for side in range(2):
            mine, last = lax.rem(chunk - first, 2) == side, chunk == stop - 1

            @pl.when(mine & ~last)
            def _(side=side):
                wait(side)
                for place in range(keys):
                    fetch(chunk + 1, place, 1 - side)
                attend(chunk, side)

            @pl.when(mine & last)
            def _(side=side):
                wait(side)
                attend(chunk, side)

    some_NL = total_ref[...] > 0
    total_NL = jnp.where(some_NL, total_ref[...], 1.0)
    out_ref[0, 0] = (mixed_ref[...] / total_NL[:, :1]).astype(out_ref.dtype)
    for ref in lse_ref:
        ref[0, 0] = jnp.where(some_NL, largest_ref[...] + jnp.log(total_NL), MASKED)


def _load(chunk_ref, keys: int, tiles: int) -> Array:
    """A chunk's latents [keys, channels]. In bfloat16 a word is two channels 128 apart: its halves
    are taken apart, each the upper half of a float32.
    """
    if chunk_ref.dtype == F32:
        flat_ref = chunk_ref.reshape(keys * tiles * 2, LANES)
        return jnp.concatenate(
            [flat_ref[pl.ds(half, keys, stride=2 * tiles)] for half in range(2 * tiles)], axis=1
        )
    flat_ref = chunk_ref.bitcast(jnp.uint32).reshape(keys * tiles, LANES)
    words = [flat_ref[pl.ds(tile, keys, stride=tiles)] for tile in range(tiles)]
    halves = [half for word in words for half in (word << 16, word & jnp.uint32(0xFFFF0000))]
    return jnp.concatenate(
        [lax.bitcast_convert_type(half, F32).astype(chunk_ref.dtype) for half in halves], axis=1
    )


def _load_whole(chunk_ref, keys: int, tiles: int) -> Array:
    """The same for the interpreter that watches for races, which takes references as they are; the
    plain one runs `_load`. The compiler makes more of this.
    """
    return chunk_ref[...].reshape(keys, tiles * TILE)


def merge(out_BPNV: Array, lse_BPN1: Array) -> Array:
    """A softmax from its parts: out_BNV. A part without a key has lse MASKED."""
    weight_BPN1 = jnp.exp(lse_BPN1 - jnp.max(lse_BPN1, axis=1, keepdims=True))
    return jnp.sum(out_BPNV * weight_BPN1, axis=1) / jnp.sum(weight_BPN1, axis=1)
