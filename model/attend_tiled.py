"""Attention over a whole sequence by the kernels of model/kernels: what `attend_expanded` computes, tile by tile, on whatever mesh is ambient.

    select      each query's keys, a bit a key                 queries cut over `tensor`
    attend      attention over those, and its log-sum-exp      heads cut over `tensor`
    total_kl    the indexer's loss against that attention      queries cut over `tensor`: each needs all heads

Queries are dealt out in blocks, one to each device of `tensor` in turn, so that every device gets as many long rows as short ones. Between the three the
compiler moves what lies elsewhere: the bits to all (L / 8 bytes a query), queries and log-sum-exps from heads to queries (all-to-all), and the keys of all heads
to all, which is the dearest: 49 KB a key in DeepSeek-V3.2, bfloat16.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from errors import UserError
from model.attend import IndexerInputs, IndexerReport, attend_expanded, positions_of
from model.config import ModelConfig
from model.kernels import indexer_kl, sparse_attention
from model.kernels.indexer_kl import Attention, total_kl_reference, total_kl_tpu
from model.kernels.keyset import causal, sizes, unpack
from model.kernels.selection import BLOCK, Share, select_reference, select_tpu
from model.kernels.sparse_attention import attend_reference, attend_tpu
from model.kernels.tile import padded
from model.sharding import MESH_AXES, RULES, platform

ROWS, CUT = P(RULES["batch"]), P(RULES["batch"], None, "tensor")  # of arrays [B, ...] and dealt ones [B, n, tensor, BLOCK, ...]
LEAST_TILED = 512  # tokens of a row: shorter ones would leave most of a tile empty


class Kernels(NamedTuple):
    """One implementation of each operation; signatures as the references have them."""

    select: Callable
    attend: Callable
    total_kl: Callable


KERNELS = {
    "tpu": Kernels(select_tpu, attend_tpu, total_kl_tpu),
    "cpu": Kernels(
        functools.partial(select_tpu, interpret=True),
        functools.partial(attend_tpu, tiles=sparse_attention.Tiles(128, 128, interpret=True)),
        functools.partial(total_kl_tpu, tiles=indexer_kl.Tiles(128, 128, interpret=True)),
    ),
    "reference": Kernels(select_reference, attend_reference, total_kl_reference),
}


def expanded_form(config: ModelConfig, length: int) -> Callable:
    """The table: (config.attention_form, platform, tokens of a row) -> `attend_expanded` or `attend_tiled`."""
    tiled = config.attention_form == "tiles" or (config.attention_form == "auto" and platform() == "tpu" and length >= LEAST_TILED)
    if not tiled:
        return functools.partial(attend_expanded, query_chunk=config.query_chunk, causal_parts=config.causal_parts)
    if platform() not in KERNELS:
        raise UserError(f"model.attention_form = {config.attention_form!r}: there are no kernels for {platform()}; take 'chunks'")
    return functools.partial(attend_tiled, kernels=KERNELS[platform()])


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
    record: bool = False,
) -> tuple[Array, IndexerReport, Array | None]:
    """See `attend_expanded`."""
    T, place_T = q_BTNH.shape[1], jnp.arange(q_BTNH.shape[1])
    q_BNTH, k_BNSH, v_BNSV = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNV))
    k_BNSH, v_BNSV = (jnp.repeat(x, q_BNTH.shape[1] // x.shape[1], axis=1) for x in (k_BNSH, v_BNSV))
    dealt_bits = selected = None
    if stage != "dense":
        query, index_k_BSC = indexer
        with jax.named_scope("select"):
            selected = jax.lax.stop_gradient(select(kernels, query, index_k_BSC, segments_BT, topk))
    with jax.named_scope("attention"):
        if stage == "sparse":
            dealt_bits, bits_BTW = selected, together(selected, 1)[:, :T]
        else:
            bits_BTW = causal(segments_BT, segments_BT, place_T)
        # What a block's recomputation keeps of attention, it keeps of this: the selection is not made again in the backward pass.
        bits_BTW = checkpoint_name(bits_BTW, "attention")
        heads = P(RULES["batch"], "tensor")
        out_BNTV, lse_BNT = on_mesh(kernels.attend, (heads, heads, heads, ROWS), (heads, heads))(q_BNTH, k_BNSH, v_BNSV, bits_BTW)
        out_BTNV = jnp.swapaxes(out_BNTV, 1, 2)
    recorded = positions_of(unpack(bits_BTW, T), min(topk, T)) if record and stage == "sparse" else None
    if stage == "dense":
        return out_BTNV, IndexerReport.zero(), recorded
    with jax.named_scope("indexer_kl"):
        dealt_bits = dealt(bits_BTW, 1) if dealt_bits is None else dealt_bits
        attention = jax.lax.stop_gradient(Attention(q_BNTH, k_BNSH, lse_BNT))
        kl, mass_BT = total_kl(kernels, attention, query, index_k_BSC, dealt_bits, selected)
    zero = jnp.zeros((), jnp.float32)
    if stage == "sparse":
        return out_BTNV, IndexerReport(kl, zero, zero, zero), recorded
    allowed_BT = sizes(bits_BTW)
    counts_BT = allowed_BT > topk
    recall = jnp.sum(jnp.where(counts_BT, mass_BT[:, :T], 0.0))
    random = jnp.sum(jnp.where(counts_BT, topk / jnp.maximum(allowed_BT, 1), 0.0))
    return out_BTNV, IndexerReport(kl, recall, random, jnp.sum(counts_BT, dtype=jnp.float32)), recorded


def select(kernels: Kernels, query, index_k_BSC: Array, segments_BT: Array, topk: int) -> Array:
    """Each query's keys: bits, dealt."""

    def own(q, w, segments, k_BSC, key_segments_BS):
        share = Share(jax.lax.axis_index("tensor"), devices()) if devices() > 1 else Share()
        bits_BTW, _ = kernels.select(together(q, 1), k_BSC, together(w, 1), together(segments, 1), key_segments_BS, topk, share)
        return dealt(bits_BTW, 1, 1)

    inputs = jax.lax.stop_gradient((dealt(query.q_BTIC, 1), dealt(query.w_BTI, 1), dealt(segments_BT, 1), index_k_BSC, segments_BT))
    return on_mesh(own, (CUT, CUT, CUT, ROWS, ROWS), CUT)(*inputs)


def total_kl(kernels: Kernels, attention: Attention, query, index_k_BSC: Array, bits: Array, selected: Array) -> tuple[Array, Array]:
    """The indexer's loss, and the attention's mass on the selected keys [B, T']. `bits` and `selected` are dealt."""

    def own(attention: Attention, q, w, k_BSC, bits, selected):
        attention = Attention(together(attention.q_BNTH, 2), attention.k_BNSH, together(attention.lse_BNT, 2))
        kl, mass_BT = kernels.total_kl(attention, together(q, 1), together(w, 1), k_BSC, together(bits, 1), together(selected, 1))
        return kl[None], dealt(mass_BT, 1, 1)

    by_query = P(RULES["batch"], None, None, "tensor")
    specs = (Attention(by_query, ROWS, by_query), CUT, CUT, ROWS, CUT, CUT)
    shared = Attention(dealt(attention.q_BNTH, 2), attention.k_BNSH, dealt(attention.lse_BNT, 2))
    kl_n, mass = on_mesh(own, specs, (P(MESH_AXES), CUT))(shared, dealt(query.q_BTIC, 1), dealt(query.w_BTI, 1), index_k_BSC, bits, selected)
    return jnp.sum(kl_n), together(mass, 1)


def devices() -> int:
    """Over how many `tensor` cuts."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def on_mesh(function: Callable, in_specs, out_specs) -> Callable:
    """The function, each device on its own part; without a mesh, or on one device, on the whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def dealt(x: Array, axis: int, count: int = 0) -> Array:
    """[..., T, ...] to [..., n, count, BLOCK, ...], zeros behind; `count`: the devices of `tensor`, if not given."""
    count = count or devices()
    x = padded(x, axis, -(-x.shape[axis] // (count * BLOCK)) * count * BLOCK)
    return x.reshape(*x.shape[:axis], -1, count, BLOCK, *x.shape[axis + 1 :])


def together(x: Array, axis: int) -> Array:
    """Back to [..., T', ...]: the padding stays."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])
