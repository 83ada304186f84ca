"""Attention proper: from queries, keys and values to the mixed values, dense or sparse, with what
the indexer learns from.

Three forms of the same function: `attend_expanded` over keys and values per head (training,
prefill), in chunks of queries so that no array of T x S x N ever lives; `attend_cached` over keys
and values that were kept (decoding); `attend_latent` over latents that were (decoding; the absorbed
form, arXiv 2405.04434, section 2.1.2).
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels.reference import (
    MASKED,
    IndexerQuery,
    indexer_kl,
    indexer_scores,
    select_topk,
)

LEAST_PART = 64  # queries; smaller parts cost more in small matmuls than the skipped pairs save


@flax.struct.dataclass
class IndexerStats:
    """What one layer's indexer did, summed over queries. `recall` is the share of the true
    attention's mass on the keys that top-k would select, and `recall_random` that of a uniformly
    random selection of as many; both over queries with more than topk keys, and 0 outside the
    warm-up stage.
    """

    kl: Array
    recall: Array
    recall_random: Array

    @classmethod
    def zero(cls) -> "IndexerStats":
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


class IndexerInputs(NamedTuple):
    query: IndexerQuery  # of the queries
    k_BSC: Array  # of the keys


def softmax_parts(logits_BNTS: Array, among_BTS: Array) -> tuple[Array, Array]:
    """Softmax over the keys in `among` as (unnormalised_BNTS, sum_BNT1), to be divided where that
    is cheapest; zeros, and a harmless sum, without a key.
    """
    # A bias and not a select: its backward pass is free, and a masked logit's exponential is
    # exactly 0 either way.
    logits_BNTS = logits_BNTS + jnp.where(among_BTS, 0.0, MASKED)[:, None]
    largest_BNT1 = jax.lax.stop_gradient(
        jnp.maximum(jnp.max(logits_BNTS, axis=-1, keepdims=True), MASKED / 2)
    )
    unnormalised_BNTS = jnp.exp(logits_BNTS - largest_BNT1)
    # The largest key adds exactly 1, so the bound acts where there is no key at all; a tiny one
    # would overflow in the gradient of the division.
    return unnormalised_BNTS, jnp.maximum(jnp.sum(unnormalised_BNTS, axis=-1, keepdims=True), 0.5)


def indexer_stats(
    target_BTS: Array, scores_BTS: Array, among_BTS: Array, stage: str, topk: int
) -> IndexerStats:
    """The indexer's loss and, where attention was dense, its recall (arXiv 2512.02556, section
    2.1).
    """
    kl = jnp.sum(indexer_kl(target_BTS, scores_BTS, among_BTS))
    zero = jnp.zeros((), jnp.float32)
    if stage != "warmup":
        return IndexerStats(kl, zero, zero)
    candidates_BT = jnp.sum(among_BTS, axis=-1)
    counts_BT = candidates_BT > topk
    mass_BT = jnp.sum(jnp.where(select_topk(scores_BTS, among_BTS, topk), target_BTS, 0.0), axis=-1)
    return IndexerStats(
        kl=kl,
        recall=jnp.sum(jnp.where(counts_BT, mass_BT, 0.0)),
        recall_random=jnp.sum(jnp.where(counts_BT, topk / jnp.maximum(candidates_BT, 1), 0.0)),
    )


def attend_expanded(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNV: Array,
    segments_BT: Array,
    indexer: IndexerInputs | None,
    *,
    stage: str,
    topk: int,
    query_chunk: int,
    causal_parts: int,
    record: bool = False,
) -> tuple[Array, IndexerStats, Array | None]:
    """Causal attention inside each segment, over a whole sequence (T = S).

    Args:
      q_BTNH, k_BSNH, v_BSNV: per head, rotated, q already scaled by H ** -0.5. Keys and values may
        have fewer heads than queries, each for a group of them.
      segments_BT: 0 is padding and attends to nothing.
      indexer: its queries and keys; needed by the stages "warmup" and "sparse".
      stage: "dense" | "warmup" (dense, with the indexer's loss) | "sparse" (over the selected keys
        only, with the indexer's loss).
      query_chunk: queries handled at a time; the backward pass recomputes a chunk.
      causal_parts: P, the parts the sequence is cut into, each over the keys up to its own end: of
        all pairs (P + 1) / 2P are computed, not every one.
        A part has at least LEAST_PART queries.
      record: whether to return what was selected.

    Returns:
      out_BTNV of v's dtype, zeros for padding, the indexer's report, and selected_BTk: each query's
      keys in order, -1 where there are fewer than topk; None unless `record` in stage "sparse".
    """
    T, recorded = q_BTNH.shape[1], record and stage == "sparse"
    query = None if stage == "dense" else indexer.query
    # Once, and not for every part; with keys along the rows, as then are their gradients: so
    # XLA:CPU multiplies those half as fast again.
    k_BNHS, v_BNVS = jnp.moveaxis(k_BSNH, 1, 3), jnp.moveaxis(v_BSNV, 1, 3)

    size = max(-(-T // causal_parts), LEAST_PART)
    ends = [*range(size, T, size), T]

    def in_parts(x: Array, axis: int) -> list[Array]:
        """Cut at once: the gradient joins the parts' again. That of a slice is padded to the whole,
        and XLA:CPU adds up such arrays element by element.
        """
        return jnp.split(x, ends[:-1], axis=axis)

    k_parts, v_parts = in_parts(k_BNHS, 3), in_parts(v_BNVS, 3)

    def attend_chunk(part, q_BCNH, query: IndexerQuery | None, query_segments_BC, query_index_C):
        """Queries over the keys of the first parts, to this one's end; put together in here, so
        that no copy of them is kept for the backward pass.
        """
        end = ends[part]
        key_segments_BS = segments_BT[:, :end]
        query_segments_BC1 = query_segments_BC[..., None]
        allowed_BCS = (
            (query_index_C[:, None] >= jnp.arange(end))
            & (query_segments_BC1 == key_segments_BS[:, None])
            & (query_segments_BC1 > 0)
        )
        among_BCS, scores_BCS = allowed_BCS, None
        if stage != "dense":
            scores_BCS = indexer_scores(query.q_BTIC, indexer.k_BSC[:, :end], query.w_BTI)
            if stage == "sparse":
                among_BCS = select_topk(scores_BCS, allowed_BCS, topk)
        with jax.named_scope("attention"):
            q_BNCH = jnp.swapaxes(q_BCNH, 1, 2)
            logits_BNCS = by_group(
                "BNCH,BNHS->BNCS", q_BNCH, jnp.concatenate(k_parts[: part + 1], axis=3)
            )
            weights_BNCS, sum_BNC1 = softmax_parts(logits_BNCS, among_BCS)
            mixed_BNCV = by_group(
                "BNCS,BNVS->BNCV",
                weights_BNCS.astype(v_BNVS.dtype),
                jnp.concatenate(v_parts[: part + 1], axis=3),
            )
            out_BCNV = jnp.swapaxes(mixed_BNCV / sum_BNC1, 1, 2).astype(v_BNVS.dtype)
        selected_BCk = (
            positions_of(among_BCS, min(topk, T))
            if recorded
            else jnp.zeros((*out_BCNV.shape[:2], 0), jnp.int32)
        )
        if stage == "dense":
            return (out_BCNV, selected_BCk), IndexerStats.zero()
        # The main attention's probabilities, mean over heads: what the indexer is taught. Detached.
        target_BCS = (
            jnp.einsum(
                "BNCS,BNC->BCS", *jax.lax.stop_gradient((weights_BNCS, 1 / sum_BNC1[..., 0]))
            )
            / q_BCNH.shape[2]
        )
        report = indexer_stats(target_BCS, scores_BCS, among_BCS, stage, topk)
        return (out_BCNV, selected_BCk), report

    own_queries = zip(
        *(in_parts(x_BT, 1) for x_BT in jax.tree.leaves((q_BTNH, query, segments_BT))), strict=True
    )
    structure = jax.tree.structure((q_BTNH, query, segments_BT))

    def attend_part(part: int, *leaves: Array) -> tuple[tuple[Array, Array], IndexerStats]:
        own, start, end = (
            jax.tree.unflatten(structure, leaves),
            ends[part] - leaves[0].shape[1],
            ends[part],
        )
        chunks = -(-(end - start) // query_chunk)
        # Recomputing the probabilities in the backward pass is cheaper than writing and reading [B,
        # N, C, S] a few times, even when one chunk is all there is.
        attend = jax.checkpoint(functools.partial(attend_chunk, part), prevent_cse=chunks == 1)
        if chunks == 1:
            return attend(*own, jnp.arange(start, end))
        padding = chunks * query_chunk - (end - start)

        def cut(x_BT):
            """[B, T', ...] to [chunks, B, C, ...]; padded queries have segment 0."""
            x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
            return jnp.moveaxis(
                x_BT.reshape(x_BT.shape[0], chunks, query_chunk, *x_BT.shape[2:]), 1, 0
            )

        def step(total: IndexerStats, piece):
            outs_BC, report = attend(*piece)
            return jax.tree.map(jnp.add, total, report), outs_BC

        query_index_nC = start + jnp.arange(chunks * query_chunk).reshape(chunks, query_chunk)
        report, outs_nBC = jax.lax.scan(
            step, IndexerStats.zero(), (*jax.tree.map(cut, own), query_index_nC)
        )

        def join(x_nBC):
            x_BT = jnp.moveaxis(x_nBC, 0, 1).reshape(
                x_nBC.shape[1], chunks * query_chunk, *x_nBC.shape[3:]
            )
            return x_BT[:, : end - start]

        return jax.tree.map(join, outs_nBC), report

    parts, reports = zip(
        *(attend_part(part, *leaves) for part, leaves in enumerate(own_queries)), strict=True
    )
    out_BTNV, selected_BTk = jax.tree.map(lambda *x_BT: jnp.concatenate(x_BT, axis=1), *parts)
    report = jax.tree.map(lambda *parts: sum(parts), *reports)
    return checkpoint_name(out_BTNV, "attention"), report, selected_BTk if recorded else None


def by_group(equation: str, x_BNCY: Array, y_BKSZ: Array) -> Array:
    """An einsum of x's N heads with y's, which may be fewer: each of y's K heads serves N / K of
    x's, side by side. Float32.
    """
    (B, N, *_), K = x_BNCY.shape, y_BKSZ.shape[1]
    if K == N:
        return jnp.einsum(equation, x_BNCY, y_BKSZ, preferred_element_type=jnp.float32)
    first, rest = equation.split(",")
    second, result = rest.split("->")
    grouped = f"{first.replace('N', 'NG')},{second}->{result.replace('N', 'NG')}"
    out = jnp.einsum(
        grouped,
        x_BNCY.reshape(B, K, N // K, *x_BNCY.shape[2:]),
        y_BKSZ,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, N, *out.shape[3:])


def positions_of(among_BTS: Array, count: int) -> Array:
    """The first `count` positions that are true, in order, then -1: [B, T, count] int32."""
    S = among_BTS.shape[-1]
    place_BTS = jnp.where(among_BTS, jnp.arange(S, dtype=jnp.int32), S)
    first_BTk = jnp.sort(place_BTS, axis=-1)[..., :count]
    padded_BTk = jnp.pad(first_BTk, [(0, 0), (0, 0), (0, max(count - S, 0))], constant_values=S)
    return jnp.where(padded_BTk < S, padded_BTk, -1)
