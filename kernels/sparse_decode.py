"""Attention of one new token for each row over the latents it selected, read one by one.

    out = softmax(q c^T over the listed tokens) c[:, :value_rank]

That is absorbed decoding (arXiv 2405.04434, section 2.1.2) over a selection (arXiv 2512.02556).
All heads read the same latents, so a row costs what its list is long, whatever the context. On TPU
a token is tiles of its own, [n, 2, 128] padded with zeros after its R channels (DeepSeek's 576 in
bfloat16: n = 3, 1,536 bytes), so that one copy fetches it from HBM.

How fast copies are issued bounds the kernel. So three things make issuing cheap: the copies of a
chunk are unrolled into one basic block with the products of the chunk before; the two chunks have a
buffer each, since the compiler cannot tell that two halves of one buffer do not overlap; and the
list has the first tile of each token, so that no address is computed.

| implementation | how | for |
|---|---|---|
| reference | a gather | the oracle |
| tpu | Pallas: a copy a token, two chunks in flight, a running softmax | TPU, where `in_tiles` |

Letters beside the legend's: k listed tokens; X splits of a row; n tiles of a token; in the kernel N
padded heads, K keys of a chunk, C padded channels, L the 128 lanes.
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
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, dot, padded

TILE = 2 * LANES  # channels of a tile
HEADS = 16  # the number of heads is padded to a multiple: whole registers of bfloat16
# Slots of the cache from which fetching token by token beats reading every latent and masking most.
# On v6e 2,048 copies and their list take about 7.5 us by the static schedule (bench/decode.py), and
# a microsecond until the first arrive; in that time 1.64 TB/s bring 12,000 latents of 1,152 bytes.
# Estimated, not measured.
CROSSOVER = 12_288
# Copies that a step of the first chunk's loop issues: there is no product yet to hide them behind.
UNROLLED = 16


def in_tiles(platform: str, slots: int, topk: int) -> bool:
    """Returns whether a cache that is read sparsely is kept as tiles, for the kernel.

    Args:
      platform: "cpu", "gpu" or "tpu".
      slots: how many tokens a row of the cache has room for.
      topk: how many tokens a query selects.
    """
    return platform == "tpu" and slots >= max(CROSSOVER, topk + 1)


def to_tiles(latent_BSR: Array) -> Array:
    """Cuts latents [..., R] into tiles of a token, [..., n, 2, 128], padded with zeros."""
    *rows, R = latent_BSR.shape
    tiles = -(-R // TILE)
    return padded(latent_BSR, len(rows), tiles * TILE).reshape(*rows, tiles, 2, LANES)


def from_tiles(tiles_BSn2L: Array, rank: int) -> Array:
    """Returns the first `rank` channels of each token, [..., rank]."""
    return tiles_BSn2L.reshape(*tiles_BSn2L.shape[:-3], -1)[..., :rank]


def decode_reference(
    q_BNR: Array, latent_BSR: Array, value_rank: int, index_Bk: Array, count_B: Array
) -> Array:
    """Attends to the listed latents, which it gathers.

    Args:
      q_BNR: absorbed queries, scaled.
      latent_BSR: the cache.
      value_rank, index_Bk, count_B: see `decode_tpu`.

    Returns: out_BNV of the cache's dtype, zeros for a row whose count is 0.
    """
    listed_BkR = jnp.take_along_axis(latent_BSR, index_Bk[:, :, None], axis=1)
    counted_B1k = (jnp.arange(index_Bk.shape[1]) < count_B[:, None])[:, None]
    logits_BNk = jnp.where(
        counted_B1k,
        jnp.einsum("BNR,BkR->BNk", q_BNR, listed_BkR, preferred_element_type=F32),
        MASKED,
    )
    max_BN1 = jnp.maximum(jnp.max(logits_BNk, axis=-1, keepdims=True), INITIAL_MAX)
    p_BNk = jnp.exp(logits_BNk - max_BN1)
    # The largest logit adds 1, so the bound acts only on a row without a key.
    total_BN1 = jnp.maximum(jnp.sum(p_BNk, axis=-1, keepdims=True), 0.5)
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
    num_splits: int = 1,
    interpret: Any = False,
) -> Array:
    """Attends to the listed latents by the TPU's kernel.

    Args:
      q_BNR: absorbed queries, scaled.
      tiles_BSn2L: the cache, see `to_tiles`, bfloat16 or float32; it stays in HBM.
      value_rank: how many of a latent's channels, the first ones, are its value.
      index_Bk: each row's tokens, none twice, in any order. All are in 0 .. S - 1, those after the
        row's count too: whole chunks are fetched, unchecked.
      count_B: how many of them count.
      keys: keys of a chunk at most, a multiple of 16.
      num_splits: how many programs share a row's chunks, as in Flash-Decoding: for a chip whose
        two cores are one device, and batches of few rows.
      interpret: an interpreter's parameters, or a bool.

    Returns: out_BNV of the cache's dtype, zeros for a row whose count is 0.
    """
    B, N, _ = q_BNR.shape
    _, S, tiles, _, _ = tiles_BSn2L.shape
    heads, width, dtype = -(-N // HEADS) * HEADS, -(-value_rank // LANES) * LANES, tiles_BSn2L.dtype
    q_BNC = padded(padded(q_BNR, 1, heads), 2, tiles * TILE)
    keys = min(keys, -(-index_Bk.shape[1] // UNROLLED) * UNROLLED)
    # The last chunk of a list is filled with the list's first tokens: copies of one and the same
    # token would wait for each other.
    index_Bk = jnp.pad(index_Bk, [(0, 0), (0, -index_Bk.shape[1] % keys)], mode="wrap")
    first_tile_B1k = ((index_Bk + jnp.arange(B, dtype=jnp.int32)[:, None] * S) * tiles)[:, None]

    def row_block(*block: int, **options: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block), lambda b, x, _: (b, 0, 0), **options)

    def split_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, heads, width), lambda b, x, _: (b, x, 0, 0))

    split = num_splits > 1
    out_type = jax.ShapeDtypeStruct((B, num_splits, heads, width), F32 if split else dtype)
    lse_type = jax.ShapeDtypeStruct((B, num_splits, heads, LANES), F32)
    reinterprets = not isinstance(interpret, pltpu.InterpretParams)
    out_BXNV, *lse_BXNL = pl.pallas_call(
        functools.partial(
            _kernel,
            latents_of=_latents_reinterpreted if reinterprets else _latents_reshaped,
            keys=keys,
            tiles=tiles,
            num_splits=num_splits,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, num_splits),
            in_specs=[
                row_block(1, first_tile_B1k.shape[2], memory_space=pltpu.SMEM),
                row_block(heads, tiles * TILE),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[split_block(width), split_block(LANES)] if split else [split_block(width)],
            scratch_shapes=[
                pltpu.VMEM((keys * tiles, 2, LANES), dtype),
                pltpu.VMEM((keys * tiles, 2, LANES), dtype),
                pltpu.SemaphoreType.DMA((2,)),
                *(pltpu.VMEM((heads, lanes), F32) for lanes in (LANES, LANES, width)),
            ],
        ),
        out_shape=[out_type, lse_type] if split else [out_type],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="sparse_decode",
    )(count_B, first_tile_B1k, q_BNC, tiles_BSn2L.reshape(-1, 2, LANES))
    out_BNV = out_BXNV[:, 0] if not split else combine_splits(out_BXNV, lse_BXNL[0][..., :1])
    return out_BNV.astype(dtype)[:, :N, :value_rank]


def combine_splits(out_BXNV: Array, lse_BXN1: Array) -> Array:
    """Combines the softmaxes of a row's splits to one, out_BNV; an empty split has lse MASKED."""
    weight_BXN1 = jnp.exp(lse_BXN1 - jnp.max(lse_BXN1, axis=1, keepdims=True))
    return jnp.sum(out_BXNV * weight_BXN1, axis=1) / jnp.sum(weight_BXN1, axis=1)


class Chunks(NamedTuple):
    """The listed latents of a row, a chunk at a time: from HBM into two buffers by turns."""

    index_ref: Any  # [1, 1, k]: the first tile of each listed token
    hbm_ref: Any  # [tiles of all rows, 2, 128]
    buffers: tuple[Any, Any]  # [keys * tiles, 2, 128] each
    arrived: Any  # a semaphore for each buffer
    keys: int  # of a chunk
    tiles: int  # of a token

    def fetch(self, chunk: Array, position: Any, side: int) -> None:
        """Starts the copy of one token: where it stands in a chunk, and which buffer it goes to."""
        start = pl.multiple_of(chunk * self.keys, self.keys)
        tile = self.index_ref.at[0, 0, pl.ds(start, self.keys)][position]
        into = self.buffers[side].at[pl.ds(position * self.tiles, self.tiles)]
        source = self.hbm_ref.at[pl.ds(tile, self.tiles)]
        pltpu.make_async_copy(source, into, self.arrived.at[side]).start()

    def wait(self, side: int) -> None:
        """Waits for all bytes of a chunk at once."""
        any_chunk = self.hbm_ref.at[pl.ds(0, self.keys * self.tiles)]
        pltpu.make_async_copy(any_chunk, self.buffers[side], self.arrived.at[side]).wait()


class RunningSoftmax(NamedTuple):
    """A softmax over keys that come chunk by chunk: its maximum and its sums so far.

    The maximum and the total of each head are equal in all lanes.
    """

    max_ref: Any  # [N, 128]
    total_ref: Any  # [N, 128]
    mixed_ref: Any  # [N, V]

    def reset(self) -> None:
        """Begins without any key."""
        self.max_ref[...] = jnp.full(self.max_ref.shape, INITIAL_MAX, F32)
        self.total_ref[...] = jnp.zeros(self.total_ref.shape, F32)
        self.mixed_ref[...] = jnp.zeros(self.mixed_ref.shape, F32)

    def add(self, logits_NK: Array, latent_KC: Array) -> None:
        """Adds a chunk of keys; the first channels of their latents are their values."""
        before_NL = self.max_ref[...]
        max_NL = jnp.maximum(before_NL, jnp.max(logits_NK, axis=1, keepdims=True))
        p_NK = jnp.exp(logits_NK - max_NL[:, :1])
        shrink_NL = jnp.exp(before_NL - max_NL)
        self.total_ref[...] = shrink_NL * self.total_ref[...] + jnp.sum(p_NK, axis=1, keepdims=True)
        self.mixed_ref[...] = self.mixed_ref[...] * shrink_NL[:, :1] + dot(
            p_NK.astype(latent_KC.dtype), latent_KC[:, : self.mixed_ref.shape[1]], (1, 0)
        )
        self.max_ref[...] = max_NL


def _kernel(
    count_ref, index_ref, q_ref, tiles_ref, out_ref, *rest,
    latents_of: Callable[[Any, int, int], Array], keys: int, tiles: int, num_splits: int,
):  # fmt: skip
    """Computes one split of a row, chunk by chunk: the next one arrives while one is attended to.

    A chunk is in the even buffer or the odd one, counted from the program's first.
    """
    *lse_refs, even_ref, odd_ref, arrived, max_ref, total_ref, mixed_ref = rest
    chunks = Chunks(index_ref, tiles_ref, (even_ref, odd_ref), arrived, keys, tiles)
    softmax = RunningSoftmax(max_ref, total_ref, mixed_ref)
    count = count_ref[pl.program_id(0)]
    num_chunks = lax.div(count + keys - 1, keys)
    per_split = lax.div(num_chunks + num_splits - 1, num_splits)
    first, stop = (
        jnp.minimum((pl.program_id(1) + ahead) * per_split, num_chunks) for ahead in (0, 1)
    )
    softmax.reset()

    def attend(chunk: Array, side: int) -> None:
        latent_KC = latents_of(chunks.buffers[side], keys, tiles)
        logits_NK = dot(q_ref[0], latent_KC, (1, 1))
        position_NK = chunk * keys + lax.broadcasted_iota(jnp.int32, logits_NK.shape, 1)
        softmax.add(jnp.where(position_NK < count, logits_NK, MASKED), latent_KC)

    @pl.when(first < stop)
    def _fetch_first_chunk():
        @pl.loop(0, keys // UNROLLED)
        def _(group):
            for position in range(UNROLLED):
                chunks.fetch(first, group * UNROLLED + position, 0)

    @pl.loop(first, stop)
    def _attend_to_chunk(chunk):
        for side in range(2):
            in_this_buffer, last = lax.rem(chunk - first, 2) == side, chunk == stop - 1

            @pl.when(in_this_buffer & ~last)
            def _(side=side):
                chunks.wait(side)
                for position in range(keys):
                    chunks.fetch(chunk + 1, position, 1 - side)
                attend(chunk, side)

            @pl.when(in_this_buffer & last)
            def _(side=side):
                chunks.wait(side)
                attend(chunk, side)

    has_key_NL = softmax.total_ref[...] > 0
    total_NL = jnp.where(has_key_NL, softmax.total_ref[...], 1.0)
    out_ref[0, 0] = (softmax.mixed_ref[...] / total_NL[:, :1]).astype(out_ref.dtype)
    for lse_ref in lse_refs:  # none where a row is not split
        lse_ref[0, 0] = jnp.where(has_key_NL, softmax.max_ref[...] + jnp.log(total_NL), MASKED)


def _latents_reinterpreted(chunk_ref: Any, keys: int, tiles: int) -> Array:
    """Reads a chunk's latents, [keys, channels], as the compiler makes most of it.

    In bfloat16 a 32-bit word is two channels 128 apart: the halves are taken apart, each as the
    upper half of a float32.
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


def _latents_reshaped(chunk_ref: Any, keys: int, tiles: int) -> Array:
    """Reads the same latents plainly, for the interpreter that watches for races.

    That one takes no ref that is bitcast or reshaped; the plain interpreter runs
    `_latents_reinterpreted`.
    """
    return chunk_ref[...].reshape(keys, tiles * TILE)
