"""Attention over a whole sequence, in chunks of queries: the plain form that others are checked by.

`attend_expanded` is for training and prefill, over keys and values per head, dense or sparse, with
what the indexer learns from. `attend_chunk` is its equation. The forms for decoding are in
model/attention/decode.py, the one by kernels in model/attention/tiled.py; the table that chooses is
model/attention/table.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels.chunks import scan_chunks
from kernels.reference import (
    MASKED,
    IndexerQuery,
    indexer_kl,
    indexer_scores,
    select_topk,
)
from model.segments import causal_mask

# (query_segments_BT, query_index_T, key_segments_BS) -> allowed_BTS, as `causal_mask`.
Mask = Callable[[Array, Array, Array], Array]

# Queries. Smaller parts take as long, in small matmuls, as the pairs that they skip would; and each
# part is compiled by itself.
MIN_PART = 128


@flax.struct.dataclass
class IndexerStats:
    """Statistics of one layer's indexer, summed over queries.

    kl: its loss, in nats.
    recall: the main attention's probability of the keys that top-k would select.
    recall_random: that of a uniformly random selection of as many keys. Both are over queries
      with more than topk keys, and 0 outside the warm-up stage.
    """

    kl: Array
    recall: Array
    recall_random: Array

    @classmethod
    def zero(cls) -> "IndexerStats":
        """Returns the statistics of a layer without an indexer."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


class IndexerInputs(NamedTuple):
    """Inputs of attention from the indexer.

    query: the queries' side.
    k_BSC: the keys.
    given_BTk: in stage "sparse", the keys that each query attends to in place of those that the
      indexer would select: where they stand in the row, in order, then -1. A query of which none is
      given attends to the k latest that it may.
    """

    query: IndexerQuery
    k_BSC: Array
    given_BTk: Array | None = None


class KeyPrefix(NamedTuple):
    """The keys that a part of the queries may see: those from the row's start to the part's end.

    k_parts, v_parts: the keys [B, N, H, S'] and values [B, N, V, S'] of each part so far. They are
      joined where they are used.
    segments_BT, index_k_BTC: segments and indexer keys (None in stage "dense") of the whole row.
    end: where the prefix ends.
    """

    k_parts: list[Array]
    v_parts: list[Array]
    segments_BT: Array
    index_k_BTC: Array | None
    end: int


def softmax_parts(logits_BNTS: Array, allowed_BTS: Array) -> tuple[Array, Array]:
    """Computes a softmax over the allowed keys as a numerator and a denominator.

    Returns (unnormalised_BNTS, sum_BNT1), to be divided where that is cheapest: zeros, and a
    harmless sum, where there is no key.
    """
    # A bias and not a select: its backward pass is free, and a masked logit's exponential is
    # exactly 0 either way.
    logits_BNTS = logits_BNTS + jnp.where(allowed_BTS, 0.0, MASKED)[:, None]
    largest_BNT1 = jax.lax.stop_gradient(
        jnp.maximum(jnp.max(logits_BNTS, axis=-1, keepdims=True), MASKED / 2)
    )
    unnormalised_BNTS = jnp.exp(logits_BNTS - largest_BNT1)
    # The largest key adds exactly 1, so the bound acts where there is no key at all; a tiny one
    # would overflow in the gradient of the division.
    return unnormalised_BNTS, jnp.maximum(jnp.sum(unnormalised_BNTS, axis=-1, keepdims=True), 0.5)


def indexer_stats(
    target_BTS: Array, scores_BTS: Array, allowed_BTS: Array, stage: str, topk: int
) -> IndexerStats:
    """Computes the indexer's loss and, where attention is dense, its recall.

    Args:
      target_BTS: the main attention's probabilities, mean over heads (arXiv 2512.02556, section
        2.1).
      scores_BTS: the indexer's scores.
      allowed_BTS: the keys that the main attention attended to.
      stage: "warmup" | "sparse".
      topk: how many keys the indexer selects.
    """
    kl = jnp.sum(indexer_kl(target_BTS, scores_BTS, allowed_BTS))
    if stage != "warmup":
        return dataclasses.replace(IndexerStats.zero(), kl=kl)
    selected_BTS = select_topk(scores_BTS, allowed_BTS, topk)
    recall_BT = jnp.sum(jnp.where(selected_BTS, target_BTS, 0.0), axis=-1)
    return warmup_stats(kl, recall_BT, jnp.sum(allowed_BTS, axis=-1), topk)


def warmup_stats(kl: Array, recall_BT: Array, num_allowed_BT: Array, topk: int) -> IndexerStats:
    """Adds up the recall of the queries that have more than `topk` keys to choose from.

    Args:
      kl: the indexer's loss, summed over queries.
      recall_BT: the attention's probability of the keys that the indexer selects.
      num_allowed_BT: how many keys each query may attend to.
      topk: how many of them the indexer selects.
    """
    has_choice_BT = num_allowed_BT > topk
    random_BT = topk / jnp.maximum(num_allowed_BT, 1)
    return IndexerStats(
        kl=kl,
        recall=jnp.sum(jnp.where(has_choice_BT, recall_BT, 0.0)),
        recall_random=jnp.sum(jnp.where(has_choice_BT, random_BT, 0.0)),
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
    mask: Mask = causal_mask,
    record: bool = False,
) -> tuple[Array, IndexerStats, Array | None]:
    """Computes causal attention inside each segment, over a whole sequence (T = S).

    The sequence is cut into P parts of queries, each over the keys up to its own end: of all pairs
    (P + 1) / 2P are computed. A part is worked through in chunks, so that no array of T x S x N
    ever lives; the backward pass recomputes a chunk.

    Args:
      q_BTNH, k_BSNH, v_BSNV: per head, rotated, q already scaled by H ** -0.5. Keys and values may
        have fewer heads than queries, each for a group of them. V is a value's width.
      segments_BT: 0 is padding and attends to nothing.
      indexer: its queries and keys; needed by the stages "warmup" and "sparse".
      stage: "dense" | "warmup" (dense, with the indexer's loss) | "sparse" (over the selected keys
        only, with the indexer's loss).
      topk: how many keys the indexer selects for each query.
      query_chunk: queries handled at a time.
      causal_parts: P. A part has at least MIN_PART queries.
      mask: which keys a query may see, none of them later: `causal_mask`, or less.
      record: whether to return what was selected.

    Returns:
      out_BTNV of v's dtype, zeros for padding; what the indexer did; and selected_BTk, each query's
      keys in order, -1 where there are fewer than topk: None unless `record` in stage "sparse".
    """
    T = q_BTNH.shape[1]
    num_recorded = min(topk, T) if record and stage == "sparse" else 0
    index_query, index_k_BTC, given_BTk = None, None, None
    if stage != "dense" and indexer is not None:
        index_query, index_k_BTC, given_BTk = indexer
    # Transposed once, and not for every part. With keys on the last axis their gradients have them
    # there too, and XLA:CPU multiplies those 1.5 times as fast.
    k_BNHS, v_BNVS = jnp.moveaxis(k_BSNH, 1, 3), jnp.moveaxis(v_BSNV, 1, 3)
    ends = part_ends(T, causal_parts)
    k_parts, v_parts = (jnp.split(x, ends[:-1], axis=3) for x in (k_BNHS, v_BNVS))
    outs, stats = [], []
    for part, queries in enumerate(
        split_queries((q_BTNH, index_query, given_BTk, segments_BT), ends)
    ):
        so_far = slice(part + 1)
        keys = KeyPrefix(k_parts[so_far], v_parts[so_far], segments_BT, index_k_BTC, ends[part])
        attend = functools.partial(
            attend_chunk, keys, stage=stage, topk=topk, mask=mask, num_recorded=num_recorded
        )
        out, part_stats = attend_part(attend, queries, ends[part], query_chunk)
        outs.append(out)
        stats.append(part_stats)
    out_BTNV, selected_BTk = jax.tree.map(lambda *x_BT: jnp.concatenate(x_BT, axis=1), *outs)
    total = jax.tree.map(lambda *parts: sum(parts), *stats)
    return checkpoint_name(out_BTNV, "attention"), total, selected_BTk if num_recorded else None


def part_ends(length: int, parts: int) -> list[int]:
    """Returns where each part of a row ends. A part has at least MIN_PART queries."""
    size = max(-(-length // parts), MIN_PART)
    return [*range(size, length, size), length]


def split_queries(queries: Any, ends: list[int]) -> list:
    """Cuts every array of a tree along axis 1 into parts with these ends. Returns a tree a part.

    One split makes all parts, so that its gradient is one concatenation. The gradient of a slice
    is padded to the whole, and XLA:CPU adds up such arrays element by element.
    """
    leaves, structure = jax.tree.flatten(queries)
    parts = zip(*(jnp.split(x_BT, ends[:-1], axis=1) for x_BT in leaves), strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]


def attend_part(
    attend: Callable[..., tuple[tuple[Array, Array], IndexerStats]],
    queries: tuple[Array, IndexerQuery | None, Array | None, Array],
    end: int,
    query_chunk: int,
) -> tuple[tuple[Array, Array], IndexerStats]:
    """Applies `attend_chunk` to a part of the queries, chunk by chunk, and adds up the statistics.

    Args:
      attend: `attend_chunk` with the part's keys.
      queries: q_BTNH, the indexer's query, the keys given in its place and the segments of the
        part.
      end: where the part ends in the row.
      query_chunk: queries handled at a time. Those that fill the last chunk have segment 0.
    """
    length = queries[0].shape[1]
    query_index_T = jnp.arange(end - length, end)
    # Recomputing the probabilities in the backward pass is cheaper than writing and reading
    # [B, N, C, S] a few times, even when one chunk is all there is. The selection is kept.
    whole = length <= query_chunk
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    attend = jax.checkpoint(attend, prevent_cse=whole, policy=policy)
    if whole:
        return attend(*queries, query_index_T)

    def step(total: IndexerStats, *chunk):
        out, stats = attend(*chunk)
        return jax.tree.map(jnp.add, total, stats), out

    total, out = scan_chunks(
        step, IndexerStats.zero(), (*queries, query_index_T), query_chunk, axes=(1, 1, 1, 1, 0)
    )
    return out, total


def attend_chunk(
    keys: KeyPrefix,
    q_BTNH: Array,
    index_query: IndexerQuery | None,
    given_BTk: Array | None,
    segments_BT: Array,
    query_index_T: Array,
    *,
    stage: str,
    topk: int,
    mask: Mask,
    num_recorded: int,
) -> tuple[tuple[Array, Array], IndexerStats]:
    """Computes attention of a chunk of T queries over a prefix of the row's S keys.

    Args:
      keys: the prefix. It is put together in here, so that no copy of it is kept for the backward
        pass.
      q_BTNH, index_query, given_BTk, segments_BT: the chunk's queries, the indexer's (None in stage
        "dense"), the keys given in its place, and their segments.
      query_index_T: where the queries stand in the row.
      stage, topk, mask: see `attend_expanded`.
      num_recorded: how many selected keys to return for each query.

    Returns:
      out_BTNV, the selected keys [B, T, num_recorded], and what the indexer did.
    """
    allowed_BTS = mask(segments_BT, query_index_T, keys.segments_BT[:, : keys.end])
    selected_BTS, scores_BTS = allowed_BTS, None  # all keys, where nothing selects
    if index_query is not None and keys.index_k_BTC is not None:
        index_k_BSC = keys.index_k_BTC[:, : keys.end]
        scores_BTS = indexer_scores(index_query.q_BTIC, index_k_BSC, index_query.w_BTI)
        if stage == "sparse":
            # A rematerialised layer keeps what has this name: the backward pass does not select
            # again.
            if given_BTk is None:
                chosen_BTS = select_topk(scores_BTS, allowed_BTS, topk)
            else:
                chosen_BTS = given_keys(given_BTk, allowed_BTS, query_index_T)
            bits_BTs = jnp.packbits(chosen_BTS, axis=-1)
            bits_BTs = checkpoint_name(bits_BTs, "attention")
            selected_BTS = jnp.unpackbits(bits_BTs, axis=-1, count=keys.end).astype(bool)
    with jax.named_scope("attention"):
        q_BNTH = jnp.swapaxes(q_BTNH, 1, 2)
        k_BNHS = jnp.concatenate(keys.k_parts, axis=3)
        weights_BNTS, sum_BNT1 = softmax_parts(
            by_group("BNTH,BNHS->BNTS", q_BNTH, k_BNHS), selected_BTS
        )
        dtype = keys.v_parts[0].dtype
        v_BNVS = jnp.concatenate(keys.v_parts, axis=3)
        mixed_BNTV = by_group("BNTS,BNVS->BNTV", weights_BNTS.astype(dtype), v_BNVS)
        out_BTNV = jnp.swapaxes(mixed_BNTV / sum_BNT1, 1, 2).astype(dtype)
    selected_BTk = (
        positions_of(selected_BTS, num_recorded)
        if num_recorded
        else jnp.zeros((*out_BTNV.shape[:2], 0), jnp.int32)
    )
    if scores_BTS is None:
        return (out_BTNV, selected_BTk), IndexerStats.zero()
    # The main attention's probabilities, mean over heads: what the indexer is taught. Detached.
    probabilities = jax.lax.stop_gradient((weights_BNTS, 1 / sum_BNT1[..., 0]))
    target_BTS = jnp.einsum("BNTS,BNT->BTS", *probabilities) / q_BTNH.shape[2]
    stats = indexer_stats(target_BTS, scores_BTS, selected_BTS, stage, topk)
    return (out_BTNV, selected_BTk), stats


def by_group(equation: str, x_BNTY: Array, y_BKSZ: Array) -> Array:
    """Computes an einsum of x's N heads with y's K heads, which may be fewer, in float32.

    Each of y's heads serves N / K of x's, side by side. `equation` writes N for both.
    """
    (B, N, *_), K = x_BNTY.shape, y_BKSZ.shape[1]
    if K == N:
        return jnp.einsum(equation, x_BNTY, y_BKSZ, preferred_element_type=jnp.float32)
    first, rest = equation.split(",")
    second, result = rest.split("->")
    grouped = f"{first.replace('N', 'NG')},{second}->{result.replace('N', 'NG')}"
    out = jnp.einsum(
        grouped,
        x_BNTY.reshape(B, K, N // K, *x_BNTY.shape[2:]),
        y_BKSZ,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, N, *out.shape[3:])


def given_keys(given_BTk: Array, allowed_BTS: Array, query_index_T: Array) -> Array:
    """Returns the keys that are given to each query, bool [B, T, S], see `IndexerInputs`."""
    S, k = allowed_BTS.shape[-1], given_BTk.shape[-1]
    index_BTk = jnp.where(given_BTk < 0, S, given_BTk)
    given_BTS = jax.vmap(jax.vmap(lambda index_k: jnp.zeros(S, bool).at[index_k].set(True)))(
        index_BTk
    )
    latest_TS = jnp.arange(S) > query_index_T[:, None] - k
    any_BT1 = jnp.any(given_BTk >= 0, axis=-1, keepdims=True)
    return jnp.where(any_BT1, given_BTS, latest_TS) & allowed_BTS


def positions_of(selected_BTS: Array, count: int) -> Array:
    """Returns the first `count` positions that are true, in order, then -1: [B, T, count] int32."""
    S = selected_BTS.shape[-1]
    index_BTS = jnp.where(selected_BTS, jnp.arange(S, dtype=jnp.int32), S)
    first_BTk = jnp.sort(index_BTS, axis=-1)[..., :count]
    padded_BTk = jnp.pad(first_BTk, [(0, 0), (0, 0), (0, max(count - S, 0))], constant_values=S)
    return jnp.where(padded_BTk < S, padded_BTk, -1)


def in_order(index_BTk: Array, filled_BTk: Array) -> Array:
    """Returns the indices of filled places in order, then -1: [..., k] int32."""
    after = jnp.iinfo(jnp.int32).max
    sorted_BTk = jnp.sort(jnp.where(filled_BTk, index_BTk, after), axis=-1)
    return jnp.where(sorted_BTk == after, -1, sorted_BTk)
