"""Attention of new tokens over what is cached: over keys and values, and over latents.

Over latents it has the absorbed form (arXiv 2405.04434, section 2.1.2): one key-value head as wide
as a latent, shared by all query heads, its first `value_rank` channels the value. Its four
functions compute the same; `latent_form` in model/attention/table.py chooses one.

With an indexer each query reads the latents it selects, and with attention_top_p below 1 of those
the fewest that have that share of the softmax of the indexer's scores. Without one it reads the
fewest by the estimate in four bits (Twilight, arXiv 2502.02770).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels import decode_selection, sparse_decode
from kernels.device import ambient_device
from kernels.reference import (
    MASKED,
    IndexerQuery,
    indexer_scores,
    masked_scores,
    select_topk,
    top_p_keys,
)
from model.attention.caches import KeyValueCache, LatentCache
from model.attention.int4 import dequantise
from model.attention.reference import by_group, in_order, positions_of, softmax_parts
from model.sharding import map_shards, spec


def attend_cached(q_BTNH: Array, cache: KeyValueCache, allowed_BTS: Array) -> Array:
    """Computes the attention of new tokens over cached keys and values of K key-value heads.

    With attention_top_p below 1 the query heads of a key-value head read the union of what each of
    them keeps by the estimate: its keys are read once for all of them, and each head has its share.

    Args:
      q_BTNH: queries, rotated and scaled.
      cache: holds the keys and values of these tokens too.
      allowed_BTS: the slots that each token may attend to.

    Returns: out_BTNH.
    """
    k_BSKH, v_BSKH, estimate = cache.k_BSKH, cache.v_BSKH, cache.estimate
    with jax.named_scope("cached_attention"):
        q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        logits_BNTS = by_group("BNTH,BNSH->BNTS", q_BNTH, k_BKSH)
        if estimate is not None:
            estimate_BKSH = jnp.swapaxes(dequantise(estimate, k_BSKH.shape[-1]), 1, 2)
            kept_BKTS = keep_by_estimate(
                by_group("BNTH,BNSH->BNTS", q_BNTH, estimate_BKSH),
                allowed_BTS,
                cache.attention_top_p,
                groups=k_BKSH.shape[1],
            )
            logits_BNTS += jnp.repeat(
                jnp.where(kept_BKTS, 0.0, MASKED), q_BNTH.shape[1] // k_BKSH.shape[1], axis=1
            )
        weights_BNTS, sum_BNT1 = softmax_parts(logits_BNTS, allowed_BTS)
        mixed_BNTH = by_group("BNTS,BNSH->BNTH", weights_BNTS.astype(v_BKSH.dtype), v_BKSH)
        return jnp.swapaxes(mixed_BNTH / sum_BNT1, 1, 2).astype(v_BKSH.dtype)


def keep_by_estimate(logits_BNTS: Array, allowed_BTS: Array, top_p: float, groups: int) -> Array:
    """Returns the keys [B, groups, T, S] that each of `groups` groups of heads keeps.

    A group keeps the union of what its heads keep: each the fewest allowed keys with a share of
    `top_p` of its attention, by these logits.
    """
    B, N, T, S = logits_BNTS.shape
    kept_BNTS = top_p_keys(
        logits_BNTS, jnp.broadcast_to(allowed_BTS[:, None], logits_BNTS.shape), top_p
    )
    return jnp.any(kept_BNTS.reshape(B, groups, N // groups, T, S), axis=2)


def attend_masked(
    q_BTNR: Array,
    cache: LatentCache,
    allowed_BTS: Array,
    index_query: IndexerQuery | None,
    *,
    value_rank: int,
    topk: int,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Reads every latent of the cache, in either layout, and masks those that are not selected.

    Args:
      q_BTNR: absorbed queries, scaled.
      cache: holds the latents of these tokens too.
      allowed_BTS: the slots that each token may attend to.
      index_query: the indexer's query; None attends without an indexer.
      value_rank: how many of a latent's channels are its value.
      topk: how many slots the indexer selects.
      record: whether to return what was selected.

    Returns: out_BTNR [B, T, N, value_rank], to be expanded by the value up-projection; and
    selected_BTk, the keys that each query attends to, in order, -1 where they are fewer than topk:
    None unless `record`, and without an indexer.
    """
    latent_BSR = cache.latent_BSR
    if cache.layout == "tiles":
        latent_BSR = sparse_decode.from_tiles(latent_BSR, q_BTNR.shape[-1])
    top_p, R = cache.attention_top_p, latent_BSR.shape[-1]
    if index_query is not None and (topk < latent_BSR.shape[1] or top_p < 1):
        scores_BTS = indexer_scores(index_query.q_BTIC, cache.index_key_BSC, index_query.w_BTI)
        allowed_BTS = top_p_keys(scores_BTS, select_topk(scores_BTS, allowed_BTS, topk), top_p)
    elif cache.estimate is not None:
        estimate_BSR = dequantise(cache.estimate, R)
        logits_BNTS = _latent_logits(q_BTNR, estimate_BSR)
        allowed_BTS = keep_by_estimate(logits_BNTS, allowed_BTS, top_p, groups=1)[:, 0]
    selected_BTk = None
    if record and index_query is not None:
        selected_BTk = positions_of(allowed_BTS, min(topk, latent_BSR.shape[1]))
    return _attend_rows(q_BTNR, latent_BSR, allowed_BTS, value_rank), selected_BTk


def attend_gathered(
    q_B1NR: Array,
    cache: LatentCache,
    allowed_B1S: Array,
    index_query: IndexerQuery,
    *,
    value_rank: int,
    topk: int,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Gathers the latents that one query a row selects by `top_k`. See `attend_masked`."""
    scores_B1S = indexer_scores(index_query.q_BTIC, cache.index_key_BSC, index_query.w_BTI)
    # Disallowed keys score -inf, sort last, and stay disallowed where fewer than topk are allowed.
    scores_Bk, index_Bk = jax.lax.top_k(masked_scores(scores_B1S, allowed_B1S)[:, 0], topk)
    latent_BkR = jnp.take_along_axis(cache.latent_BSR, index_Bk[:, :, None], axis=1)
    allowed_B1k = jnp.take_along_axis(allowed_B1S, index_Bk[:, None], axis=2)
    allowed_B1k = top_p_keys(scores_Bk[:, None], allowed_B1k, cache.attention_top_p)
    selected_B1k = in_order(index_Bk[:, None], allowed_B1k) if record else None
    return _attend_rows(q_B1NR, latent_BkR, allowed_B1k, value_rank), selected_B1k


def attend_listed(
    q_B1NR: Array,
    cache: LatentCache,
    allowed_B1S: Array,
    index_query: IndexerQuery,
    *,
    value_rank: int,
    topk: int,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Gathers the latents that one query a row selects by counting. See `attend_masked`.

    This is what the kernels of `attend_tiles` do, by XLA: no sort.
    """
    index_Bk, count_B = decode_selection.list_selected_reference(
        index_query.q_BTIC[:, 0],
        cache.index_key_BSC,
        index_query.w_BTI[:, 0],
        allowed_B1S[:, 0],
        topk,
        cache.attention_top_p,
    )
    with jax.named_scope("latent_attention"):
        out_BNR = sparse_decode.decode_reference(
            q_B1NR[:, 0], cache.latent_BSR, value_rank, index_Bk, count_B
        )
        return out_BNR[:, None], listed(index_Bk, count_B) if record else None


def attend_tiles(
    q_B1NR: Array,
    cache: LatentCache,
    allowed_B1S: Array,
    index_query: IndexerQuery,
    *,
    value_rank: int,
    topk: int,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Reads the latents that one query a row selects, by the kernels. See `attend_masked`.

    On a mesh each device has its rows' latents whole, and its heads' queries. The list of a row is
    made by every device that has heads of it. Where there is no TPU, which only a test asks for,
    the kernels are interpreted.
    """
    device = ambient_device()
    interpret = device.platform != "tpu"

    def attend(q_BNR, tiles_BSn2L, q_BIC, k_BSC, w_BI, allowed_BS) -> tuple[Array, Array, Array]:
        """Attends for one device's rows and heads, by the kernels.

        Args:
          q_BNR: the queries of the attention, one a row.
          tiles_BSn2L: the latents in the layout "tiles"; n pairs of L = 128 lanes.
          q_BIC, k_BSC, w_BI: the indexer's queries, cached keys and head weights.
          allowed_BS: bool, the slots that each row may attend to.

        Returns: out_BNR, each head's mean of the latents' first `value_rank` channels, and the
        list of what it read with its length.
        """
        index_Bk, count_B = decode_selection.list_selected_tpu(
            q_BIC, k_BSC, w_BI, allowed_BS, topk, cache.attention_top_p, interpret=interpret
        )
        cores = getattr(device, "num_cores", None) or 1
        num_splits = 1 if q_BNR.shape[0] % cores == 0 else cores
        out_BNR = sparse_decode.decode_tpu(
            q_BNR,
            tiles_BSn2L,
            value_rank,
            index_Bk,
            count_B,
            num_splits=num_splits,
            interpret=interpret,
        )
        return out_BNR, index_Bk, count_B

    rows, heads = spec("batch"), spec("batch", "heads")
    attend = map_shards(attend, (heads, *[rows] * 5), (heads, rows, rows))
    with jax.named_scope("latent_attention"):
        out_BNR, index_Bk, count_B = attend(
            q_B1NR[:, 0],
            cache.latent_BSR,
            index_query.q_BTIC[:, 0],
            cache.index_key_BSC,
            index_query.w_BTI[:, 0],
            allowed_B1S[:, 0],
        )
        return out_BNR[:, None], listed(index_Bk, count_B) if record else None


def attend_one_by_one(
    form: Callable[..., tuple[Array, Array | None]],
    q_BTNR: Array,
    cache: LatentCache,
    allowed_BTS: Array,
    index_query: IndexerQuery,
    **options: Any,
) -> tuple[Array, Array | None]:
    """Attends from a few queries a row by a form that takes one. See `attend_masked`."""
    found = []
    for t in range(q_BTNR.shape[1]):
        q_B1NR, allowed_B1S, own = jax.tree.map(
            lambda x_BT, t=t: x_BT[:, t : t + 1], (q_BTNR, allowed_BTS, index_query)
        )
        found.append(form(q_B1NR, cache, allowed_B1S, own, **options))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *found)


def listed(index_Bk: Array, count_B: Array) -> Array:
    """Returns the first `count_B` entries of lists in order, then -1: [B, 1, k]."""
    filled_Bk = jnp.arange(index_Bk.shape[1]) < count_B[:, None]
    return in_order(index_Bk, filled_Bk)[:, None]


def _latent_logits(q_BTNR: Array, latent_BSR: Array) -> Array:
    """Returns logits_BNTS in float32."""
    return jnp.einsum("BTNR,BSR->BNTS", q_BTNR, latent_BSR, preferred_element_type=jnp.float32)


def _attend_rows(q_BTNR: Array, latent_BSR: Array, allowed_BTS: Array, value_rank: int) -> Array:
    """Computes softmax(q c^T over what is allowed) c[:, :value_rank], [B, T, N, value_rank]."""
    with jax.named_scope("latent_attention"):
        logits_BNTS = _latent_logits(q_BTNR, latent_BSR)
        weights_BNTS, sum_BNT1 = softmax_parts(logits_BNTS, allowed_BTS)
        # Cut after the mixing: cut before it, XLA:CPU copies the whole cache twice a step, in place
        # of writing the new entry into it.
        mixed_BNTR = jnp.einsum(
            "BNTS,BSR->BNTR",
            weights_BNTS.astype(latent_BSR.dtype),
            latent_BSR,
            preferred_element_type=jnp.float32,
        )[..., :value_rank]
        return jnp.swapaxes(mixed_BNTR / sum_BNT1, 1, 2).astype(latent_BSR.dtype)
