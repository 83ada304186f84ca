"""Attention over a whole sequence by the kernels of kernels: what `attend_expanded` computes, tile
by tile, on whatever mesh is ambient.

    select      each query's keys, a bit a key                 queries cut over `tensor` attend
    attention over those, and its log-sum-exp      heads cut over `tensor` total_kl    the indexer's
    loss against that attention      queries cut over `tensor`: each needs all heads

Queries are dealt out in blocks, one to each device of `tensor` in turn, so that every device gets
as many long rows as short ones. Between the three the
compiler moves what lies elsewhere: the bits to all (L / 8 bytes a query), queries and log-sum-exps
from heads to queries (all-to-all). All heads' keys go to all, which is the dearest, 49 KB a key in
DeepSeek-V3.2: the loss itself gathers them, piece by piece.
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
from kernels import indexer_kl, sparse_attention
from kernels.bitmask import causal, counts, unpack
from kernels.device import ambient_device
from kernels.indexer_kl import Attention, total_kl_reference, total_kl_tpu
from kernels.selection import BLOCK, select_reference, select_tpu
from kernels.sparse_attention import attend_reference, attend_tpu
from kernels.tiles import padded
from model.attention.reference import IndexerInputs, IndexerStats, positions_of
from model.mesh import MESH_AXES
from model.sharding import RULES

ROWS, CUT = (
    P(RULES["batch"]),
    P(RULES["batch"], None, "tensor"),
)  # of arrays [B, ...] and dealt ones [B, n, tensor, BLOCK, ...]
LEAST_TILED = 512  # tokens of a row: shorter ones would leave most of a tile empty
CHUNK_BYTES = (
    2**30
)  # of the products of every head that a GPU's selection or loss writes to memory at a time


class Queries(NamedTuple):
    """The indexer's, and where they stand: dealt, or a device's own."""

    q_BTIC: Array
    w_BTI: Array
    segments_BT: Array
    place_1T: Array


class Keys(NamedTuple):
    """The indexer's, of the whole sequence."""

    k_BSC: Array
    segments_BS: Array


DEALT = Queries(CUT, CUT, CUT, P(None, None, "tensor"))


def _attend_gpu(
    q_BNTH: Array, k_BKSH: Array, v_BKSV: Array, bits_BTW: Array
) -> tuple[Array, Array]:
    from kernels.sparse_attention_gpu import (
        attend_gpu,  # its part of Pallas takes longest to import, and few need it
    )

    capability = getattr(
        ambient_device(), "compute_capability", "9.0"
    )  # a device that is only compiled for does not say
    if capability != "9.0":
        raise UserError(
            f"model.attention_form = 'tiles': the kernel is for Hopper GPUs, and this one has compute capability {capability}; take 'chunks'"
        )
    if q_BNTH.dtype == jnp.float32:
        raise UserError(
            "model.attention_form = 'tiles': a GPU's tensor cores take no float32; set model.dtype = 'bfloat16', or take 'chunks'"
        )
    return attend_gpu(
        q_BNTH,
        *(jnp.repeat(x, q_BNTH.shape[1] // x.shape[1], axis=1) for x in (k_BKSH, v_BKSV)),
        bits_BTW,
    )


def _select_gpu(q_BTIC: Array, k_BSC: Array, *rest) -> tuple[Array, Array]:
    return select_reference(
        q_BTIC, k_BSC, *rest, queries=at_once(q_BTIC.shape[0] * q_BTIC.shape[2] * k_BSC.shape[1])
    )


def _total_kl_gpu(attention: Attention, q_BTIC: Array, *rest, **options) -> tuple[Array, Array]:
    (B, N, _, _), S = attention.q_BNTH.shape, attention.k_BNSH.shape[2]
    return total_kl_reference(
        attention, q_BTIC, *rest, queries=at_once(B * max(N, q_BTIC.shape[2]) * S), **options
    )


def at_once(products: int) -> int:
    """Queries of a chunk, each with so many float32 products: with 128K keys and 64 heads 32, where
    512 would fill 16 GiB several times over.
    """
    return min(256, max(1, CHUNK_BYTES // (4 * products)))


class Kernels(NamedTuple):
    """One implementation of each operation; signatures as the references have them."""

    select: Callable
    attend: Callable
    total_kl: Callable


KERNELS = {
    "tpu": Kernels(select_tpu, attend_tpu, total_kl_tpu),
    "cpu": Kernels(
        functools.partial(select_tpu, interpret=True),
        functools.partial(
            attend_tpu, tiles=sparse_attention.Tiles(128, 128, keys_backward=128, interpret=True)
        ),
        functools.partial(total_kl_tpu, tiles=indexer_kl.Tiles(128, 128, interpret=True)),
    ),
    "gpu": Kernels(_select_gpu, _attend_gpu, _total_kl_gpu),
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
    record: bool = False,
) -> tuple[Array, IndexerStats, Array | None]:
    """See `attend_expanded`."""
    T = q_BTNH.shape[1]
    q_BNTH, k_BNSH, v_BNSV = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNV))
    queries = (
        None
        if stage == "dense"
        else Queries(*(dealt(x, 1) for x in (*indexer.query, segments_BT, jnp.arange(T)[None])))
    )
    keys = None if stage == "dense" else Keys(indexer.k_BSC, segments_BT)
    with jax.named_scope("select"):
        selected = None if stage == "dense" else select(kernels, queries, keys, topk)
    bits_BTW = (
        together(selected, 1)[:, :T]
        if stage == "sparse"
        else causal(segments_BT, segments_BT, jnp.arange(T))
    )
    # What a block's recomputation keeps of attention, it keeps of this: the selection is not made
    # again in the backward pass.
    bits_BTW = checkpoint_name(bits_BTW, "attention")
    with jax.named_scope("attention"):
        heads = P(RULES["batch"], "tensor")
        out_BNTV, lse_BNT = on_mesh(kernels.attend, (heads, heads, heads, ROWS), (heads, heads))(
            q_BNTH, k_BNSH, v_BNSV, bits_BTW
        )
        out_BTNV = jnp.swapaxes(out_BNTV, 1, 2)
    recorded = (
        positions_of(unpack(bits_BTW, T), min(topk, T)) if record and stage == "sparse" else None
    )
    if stage == "dense":
        return out_BTNV, IndexerStats.zero(), recorded
    with jax.named_scope("indexer_kl"):
        attention = jax.lax.stop_gradient(Attention(q_BNTH, k_BNSH, lse_BNT))
        kl, mass = total_kl(
            kernels,
            attention,
            queries,
            keys,
            selected if stage == "sparse" else dealt(bits_BTW, 1),
            selected,
        )
    zero = jnp.zeros((), jnp.float32)
    if stage == "sparse":
        return out_BTNV, IndexerStats(kl, zero, zero), recorded
    allowed_BT = counts(bits_BTW)
    counts_BT = allowed_BT > topk
    recall = jnp.sum(jnp.where(counts_BT, together(mass, 1)[:, :T], 0.0))
    random = jnp.sum(jnp.where(counts_BT, topk / jnp.maximum(allowed_BT, 1), 0.0))
    return (
        out_BTNV,
        IndexerStats(kl, recall, random),
        recorded,
    )


def select(kernels: Kernels, queries: Queries, keys: Keys, topk: int) -> Array:
    """Each query's keys: bits, dealt."""

    def own(queries: Queries, keys: Keys):
        q_BTIC, w_BTI, segments_BT, place_1T = _own(queries)
        return dealt(
            kernels.select(
                q_BTIC, keys.k_BSC, w_BTI, segments_BT, keys.segments_BS, place_1T[0], topk
            )[0],
            1,
            1,
        )

    return on_mesh(own, (DEALT, ROWS), CUT)(*jax.lax.stop_gradient((queries, keys)))


def _own(dealt_BT):
    return jax.tree.map(lambda x: together(x, 1), dealt_BT)


def total_kl(
    kernels: Kernels,
    attention: Attention,
    queries: Queries,
    keys: Keys,
    bits: Array,
    selected: Array,
) -> tuple[Array, Array]:
    """The indexer's loss, and the attention's mass on the keys selected, dealt. `bits`, dealt: the
    keys compared.
    """
    axis = "tensor" if devices() > 1 else ""

    def own(attention: Attention, k_BSC: Array, *by_query: Array):
        given = Attention(
            together(attention.q_BNTH, 2), attention.k_BNSH, together(attention.lse_BNT, 2)
        )
        q_BTIC, w_BTI, bits_BTW, selected_BTW = _own(by_query)
        kl, mass_BT = kernels.total_kl(
            given, q_BTIC, w_BTI, k_BSC, bits_BTW, selected_BTW, axis=axis
        )
        return kl[None], dealt(mass_BT, 1, 1)

    by_query, by_head = P(RULES["batch"], None, None, "tensor"), P(RULES["batch"], "tensor")
    given = Attention(dealt(attention.q_BNTH, 2), attention.k_BNSH, dealt(attention.lse_BNT, 2))
    k_BSC = keys.k_BSC.astype(
        jnp.float32
    )  # so its gradient is added up over devices as it is, and rounded once
    specs = Attention(by_query, by_head, by_query), ROWS, CUT, CUT, CUT, CUT
    kl_n, mass = on_mesh(own, specs, (P(MESH_AXES), CUT))(
        given, k_BSC, queries.q_BTIC, queries.w_BTI, bits, selected
    )
    return jnp.sum(kl_n), mass


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
    """[..., T, ...] to [..., n, count, BLOCK, ...], zeros behind; `count`: the devices of `tensor`,
    if not given.
    """
    count = count or devices()
    x = padded(x, axis, -(-x.shape[axis] // (count * BLOCK)) * count * BLOCK)
    return x.reshape(*x.shape[:axis], -1, count, BLOCK, *x.shape[axis + 1 :])


def together(x: Array, axis: int) -> Array:
    """Back to [..., T', ...]: the padding stays."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])
