"""Sparse attention over a whole sequence that reads the selected latents alone, in plain JAX.

It computes what `attend_expanded` (model/attention/reference.py) does in stage "sparse", in the
absorbed form of MLA (arXiv 2405.04434, section 2.1.2), whose one key-value head is all that a query
fetches of a token:

    select    each query's keys, by `top_k` of the indexer's scores    no gradient
    gather    their latents, [k, R] a query
    attend    over those, with the indexer's loss over the same keys (arXiv 2512.02556, eq. 4)

Selection costs T x S / 2 scores, all else T x k. The backward pass keeps which keys were selected,
so that it neither scores nor selects again, and gathers once more.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels.chunks import map_chunks, scan_chunks
from kernels.reference import IndexerQuery, indexer_kl, indexer_scores, masked_scores
from model.attention.reference import (
    IndexerInputs,
    IndexerStats,
    in_order,
    part_ends,
    softmax_parts,
    split_queries,
)
from model.segments import causal_mask

# Floats of the latents that a chunk of queries gathers: 4 MiB, which the caches of a core hold.
GATHERED = 2**20


class Selection(NamedTuple):
    """The keys that queries attend to.

    index_BTk: int32, where they stand in the row; any key in places that are not filled.
    filled_BTk: bool, the places that hold a key.
    """

    index_BTk: Array
    filled_BTk: Array


def attend_selected(
    q_BTNR: Array,
    latent_BSR: Array,
    segments_BT: Array,
    indexer: IndexerInputs,
    *,
    value_rank: int,
    topk: int,
    query_chunk: int,
    causal_parts: int,
    record: bool = False,
) -> tuple[Array, IndexerStats, Array | None]:
    """Computes causal attention over the latents that the indexer selects, inside each segment.

    Args:
      q_BTNR: absorbed queries, the rotated part last, scaled.
      latent_BSR: each token's latent, and its rotated key last.
      segments_BT: 0 is padding.
      indexer: its queries and keys.
      value_rank: how many of a latent's channels are its value.
      topk: how many keys it selects for each query; at most S.
      query_chunk, causal_parts: as in `attend_expanded`, for the selection.
      record: whether to return what was selected.

    Returns:
      out_BTNR [B, T, N, value_rank], to be expanded by the value up-projection; what the indexer
      did; and as in `attend_expanded` selected_BTk, None unless `record`.
    """
    with jax.named_scope("select"):
        if indexer.given_BTk is None:
            selection = select(indexer, segments_BT, topk, query_chunk, causal_parts)
        else:
            selection = given_selection(indexer.given_BTk, segments_BT)
    # What a rematerialised layer keeps has this name, and so it does not select again.
    selection = checkpoint_name(selection, "attention")

    def step(kl: Array, *chunk):
        query, index_query, selection = chunk
        out_BTNR, kl_BT = attend_keys(
            query, index_query, selection, latent_BSR, indexer.k_BSC, value_rank=value_rank
        )
        return kl + jnp.sum(kl_BT), out_BTNR

    kl, out_BTNR = scan_chunks(
        step,
        jnp.zeros((), jnp.float32),
        (q_BTNR, indexer.query, selection),
        max(1, min(q_BTNR.shape[1], GATHERED // (latent_BSR[:, 0].size * topk))),
        checkpoint=True,
    )
    stats = dataclasses.replace(IndexerStats.zero(), kl=kl)
    return checkpoint_name(out_BTNR, "attention"), stats, in_order(*selection) if record else None


def select(
    indexer: IndexerInputs, segments_BT: Array, topk: int, query_chunk: int, causal_parts: int
) -> Selection:
    """Selects the best-scored keys of each query (arXiv 2512.02556, eq. 2). No gradient.

    Of equal scores the earlier key goes first. The queries are cut into parts, each of which scores
    the keys up to its own end, and worked through in chunks.
    """
    (query, k_BSC, _), T = jax.lax.stop_gradient(indexer), segments_BT.shape[1]
    ends = part_ends(T, causal_parts)
    parts = []
    for end, (queries, index_1T) in zip(
        ends, split_queries(((query, segments_BT), jnp.arange(T)[None]), ends), strict=True
    ):
        best = functools.partial(best_keys, k_BSC[:, :end], segments_BT[:, :end], topk)
        length = index_1T.shape[1]
        chunk = min(query_chunk, length)
        parts.append(map_chunks(best, (*queries, index_1T[0]), chunk, axes=(1, 1, 0)))
    return jax.tree.map(lambda *x_BTk: jnp.concatenate(x_BTk, axis=1), *parts)


def given_selection(given_BTk: Array, segments_BT: Array) -> Selection:
    """Returns the keys that are given to each query, see `IndexerInputs`."""
    T, k = given_BTk.shape[1:]
    latest_Tk = jnp.arange(T)[:, None] - jnp.arange(k)
    latest_BTk = jnp.broadcast_to(latest_Tk, given_BTk.shape)
    any_BT1 = jnp.any(given_BTk >= 0, axis=-1, keepdims=True)
    chosen_BTk = jnp.where(any_BT1, given_BTk, latest_BTk)
    index_BTk = jnp.maximum(chosen_BTk, 0)
    key_segment_BTk = jax.vmap(lambda segments_S, index_Tk: segments_S[index_Tk])(
        segments_BT, index_BTk
    )
    own_BTk = (key_segment_BTk == segments_BT[..., None]) & (segments_BT[..., None] > 0)
    return Selection(index_BTk, (chosen_BTk >= 0) & own_BTk)


def best_keys(
    k_BSC: Array,
    key_segments_BS: Array,
    topk: int,
    query: IndexerQuery,
    segments_BT: Array,
    query_index_T: Array,
) -> Selection:
    """Selects the keys of a chunk of queries among those of a prefix of the row."""
    allowed_BTS = causal_mask(segments_BT, query_index_T, key_segments_BS)
    scores_BTS = masked_scores(indexer_scores(query.q_BTIC, k_BSC, query.w_BTI), allowed_BTS)
    count = min(topk, scores_BTS.shape[-1])
    scores_BTk, index_BTk = jax.lax.top_k(scores_BTS, count)
    empty = [(0, 0), (0, 0), (0, topk - count)]
    return Selection(jnp.pad(index_BTk, empty), jnp.pad(scores_BTk > -jnp.inf, empty))


def attend_keys(
    q_BTNR: Array,
    index_query: IndexerQuery,
    selection: Selection,
    latent_BSR: Array,
    index_k_BSC: Array,
    *,
    value_rank: int,
) -> tuple[Array, Array]:
    """Attends to the selected latents; returns out_BTNR [B, T, N, value_rank] and kl_BT.

    Every query is a row of its own here, X of them with one query and k keys each.
    """
    B, T = q_BTNR.shape[:2]

    def rows(x_BTY: Array) -> Array:
        return x_BTY.reshape(B * T, *x_BTY.shape[2:])

    def gathered(x_BSY: Array) -> Array:
        return rows(jax.vmap(lambda x_SY, index_Tk: x_SY[index_Tk])(x_BSY, selection.index_BTk))

    filled_X1k = rows(selection.filled_BTk)[:, None]
    with jax.named_scope("attention"):
        latent_XkR = gathered(latent_BSR)
        logits_XN1k = jnp.einsum(
            "XNR,XkR->XNk", rows(q_BTNR), latent_XkR, preferred_element_type=jnp.float32
        )[:, :, None]
        weights_XN1k, sum_XN11 = softmax_parts(logits_XN1k, filled_X1k)
        mixed_XNR = jnp.einsum(
            "XNk,XkR->XNR",
            weights_XN1k[:, :, 0].astype(latent_XkR.dtype),
            latent_XkR[..., :value_rank],
            preferred_element_type=jnp.float32,
        )
        out_XNR = (mixed_XNR / sum_XN11[:, :, 0]).astype(latent_XkR.dtype)
    # The attention's probabilities, mean over heads: what the indexer is taught.
    target_X1k = jnp.mean(jax.lax.stop_gradient(weights_XN1k / sum_XN11), axis=1)
    q_X1IC, w_X1I = (rows(x_BTY)[:, None] for x_BTY in index_query)
    scores_X1k = indexer_scores(q_X1IC, gathered(index_k_BSC), w_X1I)
    kl_X1 = indexer_kl(target_X1k, scores_X1k, filled_X1k)
    return out_XNR.reshape(B, T, -1, value_rank), kl_X1.reshape(B, T)
