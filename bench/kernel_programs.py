"""The programs that bench.kernels compiles, counts and times.

They are the TPU kernels and what a JAX user has in their place, for one sequence at
DeepSeek-V3.2's widths. The work of each is counted (`Work`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from kernels import indexer_kl, indexer_kl_calls, sparse_attention
from kernels.bitmask import LANES, num_words
from kernels.selection import select_tpu

# Heads of a device and of all eight; the indexer's loss has them all. Then the keys of a query.
HEADS, ALL_HEADS, TOPK = 16, 128, 2_048
I, C, H, V = 64, 128, 192, 128  # the indexer's heads and width; the attention's widths
BF16, F32 = jnp.bfloat16, jnp.float32
SPLASH = 512  # queries and keys of its tiles: as ours, and its fastest size of 256 to 1024
MASK_BYTES = 4 * LANES  # of a query's bits in a tile
# A float32 for each query that is stored along lanes takes eight sublanes.
ROW_BYTES = 8 * 4


class Program(NamedTuple):
    """A function, and the shapes and dtypes of its arguments."""

    function: Callable
    shapes: tuple[tuple[tuple[int, ...], Any], ...]


class Work(NamedTuple):
    """Counts the work of a kernel for one sequence.

    Every tile with a pair of a query and an earlier key counts as computed.
    """

    kernel: str  # its name
    tiles: int  # computed
    rows: int  # runs of the code that begins and ends a sum over tiles
    flops: int  # of a tile: what the mathematics needs, two for each product
    tile_bytes: int  # fetched and written back for each tile
    row_bytes: int
    # How often a tile runs each of the longest blocks of its code, in the order of the code.
    runs: tuple[int, ...] = (1,)
    cores: int = 0  # that it runs on, 0 for all of the device


def attention_shapes(L: int, heads: int) -> tuple:
    """Returns the shapes of q, k and v for L tokens."""
    return tuple(((1, heads, L, width), BF16) for width in (H, H, V))


def programs(
    L: int, *, heads: int = HEADS, topk: int = TOPK, interpret: Any = False
) -> dict[str, Program]:
    """Returns the kernels for L tokens. `interpret` runs them without a TPU, with small tiles."""
    qkv, bits = attention_shapes(L, heads), ((1, L, num_words(L)), jnp.int32)
    indexer = ((1, L, I, C), BF16), ((1, L, C), BF16), ((1, L, I), F32)
    small = {"queries": 128, "keys": 128, "interpret": interpret} if interpret else {}
    attend_tiles, kl_tiles = sparse_attention.Tiles(**small), indexer_kl.Tiles(**small)

    def select(iq, ik, w, segments):
        return select_tpu(iq, ik, w, segments, segments, jnp.arange(L), topk, interpret=interpret)

    def attend(q, k, v, bits):
        return sparse_attention.attend_tpu(q, k, v, bits, attend_tiles)

    def kl(q, k, lse, iq, ik, w, bits):
        def total(iq, ik, w):
            return indexer_kl.total_kl_tpu(
                indexer_kl.MainAttention(q, k, lse), iq, ik, w, bits, bits, kl_tiles
            )[0]

        return jax.grad(total, (0, 1, 2))(iq, ik, w)

    return {
        "select": Program(select, (*indexer, ((1, L), jnp.int32))),
        "attention": Program(attend, (*qkv, bits)),
        "attention and gradients": Program(
            gradients(lambda q, k, v, bits: attend(q, k, v, bits)[0]), (*qkv, bits)
        ),
        "indexer's loss and gradients": Program(
            kl, (*qkv[:2], ((1, heads, L), F32), *indexer, bits)
        ),
    }


def gradients(attend: Callable) -> Callable:
    """Returns the function of the gradients to q, k and v."""
    return jax.grad(lambda q, k, v, *rest: jnp.sum(attend(q, k, v, *rest).astype(F32)), (0, 1, 2))


def splash_program(L: int, *, causal: bool, heads: int = HEADS, interpret: Any = False) -> Program:
    """Returns JAX's splash attention, forward and backward.

    Its mask is the causal one, or one that is only known when it runs, [1, L, L] bool.
    """
    sides = (
        "block_q",
        "block_kv",
        "block_kv_compute",
        "block_q_dkv",
        "block_kv_dkv",
        "block_kv_dkv_compute",
        "block_q_dq",
        "block_kv_dq",
    )
    blocks = splash.BlockSizes(**dict.fromkeys(sides, min(SPLASH, L)))
    options = {
        "block_sizes": blocks,
        "head_shards": 1,
        "q_seq_shards": 1,
        "interpret": interpret,
    }

    def attend_causal(q, k, v):
        masks = [splash_attention_mask.CausalMask((L, L))] * heads
        mask = splash_attention_mask.MultiHeadMask(masks)
        return splash.make_splash_mha(mask, **options)(q[0], k[0], v[0])

    def attend_masked(q, k, v, mask):
        kernel = splash.make_splash_mha(mask, **options)
        # Without this it asks a traced array whether it is dynamic.
        tables: tuple[Any, ...] = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
        tables = tuple(table._replace(is_dynamic_mask=True) for table in tables)
        return splash.SplashAttentionKernel(*tables, **kernel.kwargs)(q[0], k[0], v[0])

    shapes = attention_shapes(L, heads)
    if causal:
        return Program(gradients(attend_causal), shapes)
    return Program(gradients(attend_masked), (*shapes, ((1, L, L), jnp.bool_)))


def top_k_program(rows: int, L: int, topk: int = TOPK) -> Program:
    """Returns XLA's top_k of some rows of L scores."""
    return Program(lambda scores: jax.lax.top_k(scores, topk), (((rows, L), F32),))


def stored(width: int) -> int:
    """Returns the elements that a row takes in memory: whole lanes."""
    return -(-width // LANES) * LANES


def causal_tiles(L: int, queries: int, keys: int) -> int:
    """Counts the tiles that have a pair of a query and a key that is not later."""
    return sum(min(-(-(first + queries) // keys), L // keys) for first in range(0, L, queries))


def works(L: int) -> list[Work]:
    """Counts what attention's two kernels do."""
    tiles, h, v = sparse_attention.Tiles(), 2 * stored(H), 2 * stored(V)  # bytes of a head's row
    queries = tiles.queries

    heads, keys = tiles.heads, tiles.keys
    programs = HEADS // heads
    forward = Work(
        "sparse_attention",
        tiles=programs * causal_tiles(L, queries, keys),
        rows=programs * L // queries,
        flops=2 * heads * queries * keys * (H + V),
        tile_bytes=heads * keys * (h + v) + queries * MASK_BYTES,
        row_bytes=heads * queries * (h + 2 * v + ROW_BYTES),
    )

    heads, keys = tiles.heads_backward, tiles.keys_backward
    programs = HEADS // heads
    # dq is read and written in float32, queries along lanes.
    query_bytes = h + v + 2 * ROW_BYTES + 2 * 4 * H
    backward = Work(
        "sparse_attention_backward",
        tiles=programs * causal_tiles(L, queries, keys),
        rows=programs * L // keys,
        flops=2 * heads * queries * keys * (3 * H + 2 * V),
        tile_bytes=heads * queries * query_bytes + queries * MASK_BYTES,
        row_bytes=heads * keys * 2 * (h + v),
    )
    return [forward, backward]


def loss_works(L: int, heads: int, device_kind: str) -> list[Work]:
    """Counts what the two kernels of the indexer's loss do.

    The loss runs on one core: what adds to the keys' gradient must run in order. Each of its chunks
    of keys goes over all rows of tiles.
    """
    queries, keys = indexer_kl.most_queries(device_kind, L), indexer_kl.Tiles().keys
    pairs, tiles = queries * keys, causal_tiles(L, queries, keys)
    rows = L // queries * -(-L // indexer_kl.KEYS_AT_ONCE)
    head_groups = -(-heads // indexer_kl_calls.HEADS_AT_ONCE)
    h, mask, row = 2 * stored(H), queries * MASK_BYTES, queries * ROW_BYTES
    index_q, index_k = queries * I * 2 * C, keys * 2 * C
    normaliser = Work(
        "indexer_normaliser",
        tiles,
        rows,
        flops=2 * pairs * I * C,
        tile_bytes=index_k + mask,
        row_bytes=index_q + queries * 4 * stored(I),
    )
    loss = Work(
        "indexer_kl",
        tiles,
        rows,
        flops=2 * pairs * (heads * H + 3 * I * C),
        # The gradient of the keys is read and written in float32, as is that of a row's queries.
        tile_bytes=keys * heads * h + index_k + 2 * mask + 2 * keys * 4 * C,
        row_bytes=index_q + queries * heads * h + (heads + 2 * I) * row + 2 * queries * I * 4 * C,
        # The groups of the attention's heads, then the rest.
        runs=(1,) if head_groups == 1 else (head_groups, 1),
        cores=1,
    )
    return [normaliser, loss]


def splash_works(L: int, *, causal: bool) -> list[Work]:
    """Counts what splash attention's three kernels do."""
    tiles, rows = HEADS * causal_tiles(L, SPLASH, SPLASH), HEADS * L // SPLASH
    pairs, h, v = SPLASH * SPLASH, SPLASH * 2 * stored(H), SPLASH * 2 * stored(V)
    mask = 0 if causal else pairs  # a byte for each pair, for every head anew
    statistics = SPLASH * 4 * LANES  # a float32 for each query, in every lane
    flops = {
        "splash_mha_fwd_residuals": 2 * pairs * (H + V),
        "splash_mha_dq_no_residuals": 2 * pairs * (2 * H + V),
        "splash_mha_dkv_no_residuals": 2 * pairs * (2 * H + 2 * V),
    }
    row_bytes = h + 2 * v + statistics, 2 * h + v, 2 * (h + v)
    return [
        Work(kernel, tiles, rows, needed, h + v + mask, of_row)
        for (kernel, needed), of_row in zip(flops.items(), row_bytes, strict=True)
    ]
