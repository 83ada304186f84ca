"""Attention over a whole sequence by kernels, tile by tile, on whatever mesh is ambient.

It computes what `attend_expanded` (model/attention/reference.py) does, in three steps:

    select      each query's keys, a bit a key               queries divided over devices
    attend      over those, with its log-sum-exp             heads divided over devices
    total_kl    the indexer's loss against that attention    queries divided: each needs all heads

Queries are divided block-cyclically: blocks of BLOCK go to the devices in turn, so that every
device gets as many queries with many keys before them as with few. Between the steps the compiler
moves what lies elsewhere: the bits to all devices (L / 8 bytes a query), queries and log-sum-exps
from heads to queries (all-to-all). All heads' keys go to all devices too, which moves the most, 49
KB a key in DeepSeek-V3.2: the loss itself gathers them, chunk by chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from errors import UserError
from kernels import indexer_kl, sparse_attention
from kernels.bitmask import causal_bits, count_keys, pack, unpack
from kernels.chunks import map_chunks
from kernels.device import ambient_device
from kernels.indexer_kl import MainAttention, total_kl_reference, total_kl_tpu
from kernels.selection import BLOCK, select_reference, select_tpu
from kernels.sparse_attention import attend_reference, attend_tpu
from kernels.tiles import padded
from model.attention.reference import (
    IndexerInputs,
    IndexerStats,
    Mask,
    given_keys,
    positions_of,
    warmup_stats,
)
from model.segments import causal_mask
from model.sharding import ambient_shards, map_shards, mesh_axes, mesh_axis, spec

MIN_TILED = 512  # tokens of a row: shorter ones would leave most of a tile empty
# Bytes of the products of all heads that a GPU's selection or loss writes to memory at a time.
CHUNK_BYTES = 2**30


class Queries(NamedTuple):
    """The indexer's side of the queries: block-cyclic, or a device's own.

    index_1T: where the queries stand in the row; [1, T], to be cut into blocks as the others are.
    """

    q_BTIC: Array
    w_BTI: Array
    segments_BT: Array
    index_1T: Array


class Keys(NamedTuple):
    """The indexer's side of the keys, of the whole sequence."""

    k_BSC: Array
    segments_BS: Array


# Shardings of arrays [B, ...], [B, N, ...] and block-cyclic ones [B, n, devices, BLOCK, ...]. They
# stand in the place of arrays in trees, hence the type.
ROWS: Any = spec("batch")
HEADS: Any = spec("batch", "heads")
BLOCKS: Any = spec("batch", None, "query_blocks")
HEAD_BLOCKS: Any = spec("batch", None, None, "query_blocks")  # [B, N, n, devices, BLOCK, ...]
INDEX_BLOCKS: Any = spec(None, None, "query_blocks")
QUERY_BLOCKS = Queries(BLOCKS, BLOCKS, BLOCKS, INDEX_BLOCKS)


class Kernels(NamedTuple):
    """One implementation of each step, with the signatures of the references."""

    select: Callable[..., tuple[Array, Array]]
    attend: Callable[..., tuple[Array, Array]]
    total_kl: Callable[..., tuple[Array, Array]]


def _select_gpu(q_BTIC: Array, k_BSC: Array, *rest) -> tuple[Array, Array]:
    products = q_BTIC.shape[0] * q_BTIC.shape[2] * k_BSC.shape[1]
    return select_reference(q_BTIC, k_BSC, *rest, queries=queries_at_once(products))


def _attend_gpu(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array
) -> tuple[Array, Array]:
    """Attends by the Hopper kernels; raises UserError on another GPU or in float32."""
    # Its part of Pallas takes longest to import, and few need it.
    from kernels.sparse_attention_gpu import attend_gpu

    # A device that is only compiled for has no capability.
    capability = getattr(ambient_device(), "compute_capability", "9.0")
    if capability != "9.0":
        raise UserError(
            "model.attention_form = 'tiles': the kernel is for Hopper GPUs, and this one has "
            f"compute capability {capability}; take 'chunks'"
        )
    if q_BNTH.dtype == jnp.float32:
        raise UserError(
            "model.attention_form = 'tiles': a GPU's tensor cores take no float32; set "
            "model.dtype = 'bfloat16', or take 'chunks'"
        )
    group = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSV = (jnp.repeat(x, group, axis=1) for x in (k_BKSH, v_BKSV))
    return attend_gpu(q_BNTH, k_BNSH, v_BNSV, bits_BTW)


def _total_kl_gpu(attention: MainAttention, q_BTIC: Array, *rest, **options) -> tuple[Array, Array]:
    (B, N, _, _), S = attention.q_BNTH.shape, attention.k_BNSH.shape[2]
    queries = queries_at_once(B * max(N, q_BTIC.shape[2]) * S)
    return total_kl_reference(attention, q_BTIC, *rest, queries=queries, **options)


def queries_at_once(products: int) -> int:
    """Returns how many queries fit CHUNK_BYTES, with so many float32 products each.

    With 128K keys and 64 heads they are 32, where 512 would fill 16 GiB several times over.
    """
    return min(256, max(1, CHUNK_BYTES // (4 * products)))


INTERPRETED = Kernels(
    functools.partial(select_tpu, interpret=True),
    functools.partial(
        attend_tpu, tiles=sparse_attention.Tiles(128, 128, keys_backward=128, interpret=True)
    ),
    functools.partial(total_kl_tpu, tiles=indexer_kl.Tiles(128, 128, interpret=True)),
)
KERNELS = {
    "tpu": Kernels(select_tpu, attend_tpu, total_kl_tpu),
    "gpu": Kernels(_select_gpu, _attend_gpu, _total_kl_gpu),
    "cpu": INTERPRETED,
    "reference": Kernels(select_reference, attend_reference, total_kl_reference),
}


def attend_tiled(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNV: Array,
    segments_BT: Array,
    indexer: IndexerInputs | None,
    *,
    stage: str,
    topk: int,
    kernels: Kernels,
    mask: Mask = causal_mask,
    record: bool = False,
) -> tuple[Array, IndexerStats, Array | None]:
    """Computes what `attend_expanded` does, by the kernels of one platform. See there.

    Queries may be grouped, several heads to one of k and v; the indexer's loss makes a copy of the
    keys for each head. Where an indexer selects, the mask must be `causal_mask`.
    """
    T = q_BTNH.shape[1]
    q_BNTH, k_BNSH, v_BNSV = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNV))
    if stage == "dense" or indexer is None:
        bits_BTW = checkpoint_name(mask_bits(mask, segments_BT), "attention")
        out_BTNV, _ = attend_heads(kernels, q_BNTH, k_BNSH, v_BNSV, bits_BTW)
        return out_BTNV, IndexerStats.zero(), None
    assert mask is causal_mask, "the kernels that select know no other mask"
    queries = Queries(
        *(to_block_cyclic(x, 1) for x in (*indexer.query, segments_BT, jnp.arange(T)[None]))
    )
    keys = Keys(indexer.k_BSC, segments_BT)
    with jax.named_scope("select"):
        if stage == "sparse" and indexer.given_BTk is not None:
            selected_blocks = to_block_cyclic(given_bits(indexer.given_BTk, segments_BT), 1)
        else:
            selected_blocks = select(kernels, queries, keys, topk)
    bits_BTW = (
        from_block_cyclic(selected_blocks, 1)[:, :T]
        if stage == "sparse"
        else mask_bits(mask, segments_BT)
    )
    # A rematerialised layer keeps what has this name, so the backward pass does not select again.
    bits_BTW = checkpoint_name(bits_BTW, "attention")
    out_BTNV, lse_BNT = attend_heads(kernels, q_BNTH, k_BNSH, v_BNSV, bits_BTW)
    recorded = stage == "sparse" and record
    selected_BTk = positions_of(unpack(bits_BTW, T), min(topk, T)) if recorded else None
    with jax.named_scope("indexer_kl"):
        group = q_BNTH.shape[1] // k_BNSH.shape[1]
        k_BNSH = k_BNSH if group == 1 else jnp.repeat(k_BNSH, group, axis=1)  # a key a head
        attention = jax.lax.stop_gradient(MainAttention(q_BNTH, k_BNSH, lse_BNT))
        allowed_blocks = selected_blocks if stage == "sparse" else to_block_cyclic(bits_BTW, 1)
        kl, recall_blocks = total_kl(
            kernels, attention, queries, keys, allowed_blocks, selected_blocks
        )
    if stage == "sparse":
        return out_BTNV, dataclasses.replace(IndexerStats.zero(), kl=kl), selected_BTk
    recall_BT = from_block_cyclic(recall_blocks, 1)[:, :T]
    return out_BTNV, warmup_stats(kl, recall_BT, count_keys(bits_BTW), topk), selected_BTk


def given_bits(given_BTk: Array, segments_BT: Array) -> Array:
    """Returns the bitmask of the keys that are given to each query, see `IndexerInputs`."""
    index_T = jnp.arange(segments_BT.shape[1])

    def bits_of(given_BTk: Array, query_segments_BT: Array, query_index_T: Array) -> Array:
        allowed_BTS = causal_mask(query_segments_BT, query_index_T, segments_BT)
        return pack(given_keys(given_BTk, allowed_BTS, query_index_T))

    return map_chunks(bits_of, (given_BTk, segments_BT, index_T), BLOCK, axes=(1, 1, 0))


def mask_bits(mask: Mask, segments_BT: Array) -> Array:
    """Returns the bitmask of a mask over whole rows, made for a chunk of queries at a time."""
    index_T = jnp.arange(segments_BT.shape[1])
    if mask is causal_mask:
        return causal_bits(segments_BT, index_T, segments_BT)

    def bits_of(query_segments_BT: Array, query_index_T: Array) -> Array:
        return pack(mask(query_segments_BT, query_index_T, segments_BT))

    return map_chunks(bits_of, (segments_BT, index_T), BLOCK, axes=(1, 0))


def select(kernels: Kernels, queries: Queries, keys: Keys, topk: int) -> Array:
    """Selects each query's keys. Returns their bits, block-cyclic."""

    def per_device(queries: Queries, keys: Keys) -> Array:
        q_BTIC, w_BTI, segments_BT, index_1T = own_queries(queries)
        bits_BTW, _ = kernels.select(
            q_BTIC, keys.k_BSC, w_BTI, segments_BT, keys.segments_BS, index_1T[0], topk
        )
        return to_block_cyclic(bits_BTW, 1, devices=1)

    select_shards = map_shards(per_device, (QUERY_BLOCKS, ROWS), BLOCKS)
    return select_shards(*jax.lax.stop_gradient((queries, keys)))


def attend_heads(
    kernels: Kernels, q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array
) -> tuple[Array, Array]:
    """Attends over the keys of a bitmask, each device its heads. Returns out_BTNV and lse_BNT."""
    with jax.named_scope("attention"):
        attend = map_shards(kernels.attend, (HEADS, HEADS, HEADS, ROWS), (HEADS, HEADS))
        out_BNTV, lse_BNT = attend(q_BNTH, k_BNSH, v_BNSV, bits_BTW)
        return jnp.swapaxes(out_BNTV, 1, 2), lse_BNT


def total_kl(
    kernels: Kernels,
    attention: MainAttention,
    queries: Queries,
    keys: Keys,
    allowed_blocks: Array,
    selected_blocks: Array,
) -> tuple[Array, Array]:
    """Computes the indexer's loss, each device for its queries.

    Args:
      kernels: the implementation.
      attention: the main attention's queries, keys and log-sum-exps of all heads.
      queries, keys: the indexer's.
      allowed_blocks: bits of the keys that attention attended to, block-cyclic.
      selected_blocks: bits of those that the indexer selects, block-cyclic.

    Returns: the loss summed over queries, and each query's attention probability of the selected
    keys, block-cyclic.
    """
    axis = mesh_axis("heads") if ambient_shards("heads") > 1 else ""

    def per_device(attention: MainAttention, k_BSC: Array, *by_query: Array) -> tuple[Array, Array]:
        own = MainAttention(
            from_block_cyclic(attention.q_BNTH, 2),
            attention.k_BNSH,
            from_block_cyclic(attention.lse_BNT, 2),
        )
        q_BTIC, w_BTI, allowed_BTW, selected_BTW = own_queries(by_query)
        kl, recall_BT = kernels.total_kl(
            own, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW, axis=axis
        )
        return kl[None], to_block_cyclic(recall_BT, 1, devices=1)

    attention = MainAttention(
        to_block_cyclic(attention.q_BNTH, 2),
        attention.k_BNSH,
        to_block_cyclic(attention.lse_BNT, 2),
    )
    # In float32, so that its gradient is added up over devices as it is, and rounded once.
    k_BSC = keys.k_BSC.astype(jnp.float32)
    in_specs = MainAttention(HEAD_BLOCKS, HEADS, HEAD_BLOCKS), ROWS, BLOCKS, BLOCKS, BLOCKS, BLOCKS
    # A loss of its own has each device along the axes that the queries lie over, and no other.
    axes = (*mesh_axes("batch"), *mesh_axes("query_blocks"))
    kl_shards = map_shards(per_device, in_specs, (P(axes), BLOCKS))
    kl_n, recall_blocks = kl_shards(
        attention, k_BSC, queries.q_BTIC, queries.w_BTI, allowed_blocks, selected_blocks
    )
    return jnp.sum(kl_n), recall_blocks


def to_block_cyclic(x: Array, axis: int, devices: int = 0) -> Array:
    """Cuts [..., T, ...] into blocks that go to the devices in turn.

    Returns [..., n, devices, BLOCK, ...], padded with zeros; `devices` are those over which the
    ambient mesh divides "query_blocks" where it is 0.
    """
    devices = devices or ambient_shards("query_blocks")
    x = padded(x, axis, -(-x.shape[axis] // (devices * BLOCK)) * devices * BLOCK)
    return x.reshape(*x.shape[:axis], -1, devices, BLOCK, *x.shape[axis + 1 :])


def from_block_cyclic(x: Array, axis: int) -> Array:
    """Joins the blocks again to [..., n * devices * BLOCK, ...]; the padding stays."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])


def own_queries(blocks: Any) -> Any:
    """Joins a device's own blocks of queries, in every array of a tree."""
    return jax.tree.map(lambda x: from_block_cyclic(x, 1), blocks)
