"""What bench.kernels compiles, counts and times: the TPU kernels and what a JAX user has in their
place, for one sequence at DeepSeek-V3.2's widths.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from kernels import indexer_kl, indexer_kl_calls, sparse_attention
from kernels.bitmask import LANES, words
from kernels.selection import select_tpu

HEADS, ALL_HEADS, TOPK = (
    16,
    128,
    2_048,
)  # heads of a device, 128 on eight; the indexer's loss has them all
I, C, H, V = 64, 128, 192, 128  # the indexer's heads and width; the attention's widths
BF16, F32 = jnp.bfloat16, jnp.float32
SPLASH = 512  # queries and keys of its tiles: as ours, and what it does best with of 256 to 1024


class Program(NamedTuple):
    function: Callable
    shapes: tuple[tuple[tuple[int, ...], jnp.dtype], ...]  # of its arguments


class Work(NamedTuple):
    """What a kernel does for a sequence. Every tile with a pair of a query and an earlier key is
    counted as computed.
    """

    kernel: str  # its name
    tiles: int  # computed
    rows: int  # how often the code runs that begins and ends a sum over tiles
    flops: int  # of a tile: what the mathematics needs, two a product
    tile_bytes: int  # fetched and put back a tile
    row_bytes: int
    runs: tuple[int, ...] = (
        1,
    )  # how often a tile runs each of the longest stretches of its code, in their order
    cores: int = 0  # that it runs on, 0 for all of the device


def attention_shapes(L: int, heads: int) -> tuple:
    return tuple(((1, heads, L, width), BF16) for width in (H, H, V))


def programs(
    L: int, *, heads: int = HEADS, topk: int = TOPK, interpret=False
) -> dict[str, Program]:
    """The kernels. `interpret` runs them without a TPU, with small tiles."""
    qkv, bits = attention_shapes(L, heads), ((1, L, words(L)), jnp.int32)
    indexer = ((1, L, I, C), BF16), ((1, L, I), F32), ((1, L, C), BF16)
    small = {"queries": 128, "keys": 128, "interpret": interpret} if interpret else {}
    attend_tiles, kl_tiles = sparse_attention.Tiles(**small), indexer_kl.Tiles(**small)

    def select(iq, w, ik, segments):
        return select_tpu(iq, ik, w, segments, segments, jnp.arange(L), topk, interpret=interpret)

    def attend(q, k, v, bits):
        return sparse_attention.attend_tpu(q, k, v, bits, attend_tiles)

    def kl(q, k, lse, iq, w, ik, bits):
        def total(iq, w, ik):
            return indexer_kl.total_kl_tpu(
                indexer_kl.Attention(q, k, lse), iq, w, ik, bits, bits, kl_tiles
            )[0]

        return jax.grad(total, (0, 1, 2))(iq, w, ik)

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
    return jax.grad(lambda q, k, v, *rest: jnp.sum(attend(q, k, v, *rest).astype(F32)), (0, 1, 2))


def splash_program(L: int, *, causal: bool, heads: int = HEADS, interpret: bool = False) -> Program:
    """JAX's splash attention, forward and backward: with a mask only known when it runs, [1, L, L]
    bool, or with the causal one.
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

    def attend(q, k, v, *masks):
        mask = (
            splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * heads)
            if causal
            else masks[0]
        )
        kernel = splash.make_splash_mha(
            mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        if not causal:  # else it asks a traced array
            tables = (
                table._replace(is_dynamic_mask=True)
                for table in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
            )
            kernel = splash.SplashAttentionKernel(*tables, **kernel.kwargs)
        return kernel(q[0], k[0], v[0])

    return Program(
        gradients(attend),
        (*attention_shapes(L, heads), *([] if causal else [((1, L, L), jnp.bool_)])),
    )


def top_k_program(rows: int, L: int, topk: int = TOPK) -> Program:
    return Program(lambda scores: jax.lax.top_k(scores, topk), (((rows, L), F32),))


MASK = 4 * LANES  # bytes of a query's bits in a tile
ROW = 8 * 4  # a float32 a query that is stored along lanes takes eight sublanes


def stored(width: int) -> int:
    """Elements of a row in memory: whole lanes."""
    return -(-width // LANES) * LANES


def causal_tiles(L: int, queries: int, keys: int) -> int:
    return sum(min(-(-(first + queries) // keys), L // keys) for first in range(0, L, queries))


def works(L: int) -> list[Work]:
    """Of attention's kernels."""
    tiles, h, v, mask, row = sparse_attention.Tiles(), 2 * stored(H), 2 * stored(V), MASK, ROW

    queries, keys = tiles.queries, tiles.keys
    forward_tile = tiles.heads * keys * (h + v) + queries * mask
    forward_row = tiles.heads * queries * (h + 2 * v + row)

    heads, keys_backward = tiles.heads_backward, tiles.keys_backward
    backward_tile = (
        heads * queries * (h + v + 2 * row + 2 * 4 * H) + queries * mask
    )  # dq comes and goes in float32, queries along lanes
    backward_row = heads * keys_backward * 2 * (h + v)

    def attention(
        kernel: str, heads: int, keys: int, widths: int, row: int, tile_bytes: int, row_bytes: int
    ) -> Work:
        programs, flops = HEADS // heads, 2 * heads * queries * keys * widths
        return Work(
            kernel,
            programs * causal_tiles(L, queries, keys),
            programs * L // row,
            flops,
            tile_bytes,
            row_bytes,
        )

    return [
        attention("sparse_attention", tiles.heads, keys, H + V, queries, forward_tile, forward_row),
        attention(
            "sparse_attention_backward",
            heads,
            keys_backward,
            3 * H + 2 * V,
            keys_backward,
            backward_tile,
            backward_row,
        ),
    ]


def loss_works(L: int, heads: int, device_kind: str) -> list[Work]:
    """Of the indexer's loss, on one core: what adds to the keys' gradient must run in order. Each
    piece of the keys goes over all rows of tiles.
    """
    queries, keys = indexer_kl.most_queries(device_kind, L), indexer_kl.Tiles().keys
    pairs, tiles, rows = (
        queries * keys,
        causal_tiles(L, queries, keys),
        L // queries * -(-L // indexer_kl.KEYS_AT_ONCE),
    )
    groups, h, mask, row = (
        -(-heads // indexer_kl_calls.HEADS_AT_ONCE),
        2 * stored(H),
        queries * MASK,
        queries * ROW,
    )
    index_q, index_k = queries * I * 2 * C, keys * 2 * C
    kl_tile = (
        keys * heads * h + index_k + 2 * mask + 2 * keys * 4 * C
    )  # the keys' gradient comes and goes in float32
    kl_row = (
        index_q + queries * heads * h + heads * row + 2 * I * row + 2 * queries * I * 4 * C
    )  # and so does that of a row's queries
    kl_runs = (1,) if groups == 1 else (groups, 1)  # the attention's heads, then the rest
    return [
        Work(
            "indexer_normaliser",
            tiles,
            rows,
            2 * pairs * I * C,
            index_k + mask,
            index_q + queries * 4 * stored(I),
        ),
        Work(
            "indexer_kl",
            tiles,
            rows,
            2 * pairs * (heads * H + 3 * I * C),
            kl_tile,
            kl_row,
            kl_runs,
            cores=1,
        ),
    ]


def splash_works(L: int, *, causal: bool) -> list[Work]:
    tiles, rows, pairs = (
        HEADS * causal_tiles(L, SPLASH, SPLASH),
        HEADS * L // SPLASH,
        SPLASH * SPLASH,
    )
    h, v, mask = (
        SPLASH * 2 * stored(H),
        SPLASH * 2 * stored(V),
        0 if causal else pairs,
    )  # a byte a pair, for every head anew
    row = SPLASH * 4 * LANES
    return [
        Work(
            "splash_mha_fwd_residuals",
            tiles,
            rows,
            2 * pairs * (H + V),
            h + v + mask,
            h + 2 * v + row,
        ),
        Work(
            "splash_mha_dq_no_residuals",
            tiles,
            rows,
            2 * pairs * (2 * H + V),
            h + v + mask,
            2 * h + v,
        ),
        Work(
            "splash_mha_dkv_no_residuals",
            tiles,
            rows,
            2 * pairs * (2 * H + 2 * V),
            h + v + mask,
            2 * (h + v),
        ),
    ]
