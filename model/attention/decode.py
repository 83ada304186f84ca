"""Attention of new tokens over what was kept: over keys and values, and over latents."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels import decode_selection, sparse_decode
from kernels.device import ambient_device, platform
from kernels.reference import MASKED, indexer_scores, masked_scores, select_topk, top_p_keys
from model.attention.int4 import Int4, dequantise
from model.attention.reference import IndexerInputs, by_group, softmax_parts
from model.sharding import RULES


def attend_cached(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    allowed_BTS: Array,
    *,
    top_p: float = 1.0,
    estimate: Int4 | None = None,
) -> Array:
    """Attention of the newest tokens over cached keys and values of K key-value heads; q is already
    scaled. Returns out_BTNH.

    With a mass below 1 the query heads of a key-value head read the union of what each would keep
    by the estimate: its keys are read once for all of them, and each head has its mass.
    """
    with jax.named_scope("cached_attention"):
        q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        logits_BNTS = by_group("BNTH,BNSH->BNTS", q_BNTH, k_BKSH)
        if estimate is not None:
            estimate_BKSH = jnp.swapaxes(dequantise(estimate, k_BSKH.shape[-1]), 1, 2)
            kept_BKTS = keep_by_estimate(
                by_group("BNTH,BNSH->BNTS", q_BNTH, estimate_BKSH),
                allowed_BTS,
                top_p,
                k_BKSH.shape[1],
            )
            logits_BNTS += jnp.repeat(
                jnp.where(kept_BKTS, 0.0, MASKED), q_BNTH.shape[1] // k_BKSH.shape[1], axis=1
            )
        weights_BNTS, sum_BNT1 = softmax_parts(logits_BNTS, allowed_BTS)
        mixed_BNTH = by_group("BNTS,BNSH->BNTH", weights_BNTS.astype(v_BKSH.dtype), v_BKSH)
        return jnp.swapaxes(mixed_BNTH / sum_BNT1, 1, 2).astype(v_BKSH.dtype)


def keep_by_estimate(logits_BNTS: Array, allowed_BTS: Array, mass: float, groups: int) -> Array:
    """The keys that each of `groups` groups of heads keeps [B, groups, T, S]: together, of each of
    its heads the fewest with the mass by these logits.
    """
    B, N, T, S = logits_BNTS.shape
    kept_BNTS = top_p_keys(
        logits_BNTS, jnp.broadcast_to(allowed_BTS[:, None], logits_BNTS.shape), mass
    )
    return jnp.any(kept_BNTS.reshape(B, groups, N // groups, T, S), axis=2)


def attend_latent(
    q_BTNR: Array,
    latent_BSR: Array,
    value_rank: int,
    allowed_BTS: Array,
    indexer: IndexerInputs | None,
    *,
    topk: int,
    mass: float = 1.0,
    estimate: Int4 | None = None,
) -> Array:
    """Attention over latents: one key-value head of width R shared by all query heads, its first
    `value_rank` channels the value.

    With an indexer each query reads the latents it selects, and with a mass below 1 of those the
    fewest that hold it by the softmax of the indexer's scores; without one, the fewest by the
    estimate. q is already scaled.

    | latents | queries a row | how |
    |---|---|---|
    | tiles (TPU, many slots), with an indexer | 1 | kernels: the selected latents are listed and fetched one by one (kernels/sparse_decode.py) |
    | rows, with an indexer, on a CPU | 1 | `top_k` and a gather |
    | rows, with an indexer, on a GPU | 1 | the same list by counting, and a gather: `top_k` of many sorts the whole row there |
    | any other | any | all are read, most masked: on TPU below `sparse_decode.CROSSOVER` that is less time |

    Returns out_BTNR [B, T, N, value_rank], to be expanded by the value up-projection.
    """
    if latent_BSR.ndim == 5:
        if q_BTNR.shape[1] == 1 and indexer is not None:
            return attend_tiles(q_BTNR, latent_BSR, value_rank, allowed_BTS, indexer, topk, mass)
        latent_BSR = sparse_decode.from_tiles(latent_BSR, q_BTNR.shape[-1])
    if indexer is not None and (topk < latent_BSR.shape[1] or mass < 1):
        listed = q_BTNR.shape[1] == 1 and topk < latent_BSR.shape[1]
        if listed and platform() == "gpu":
            return attend_listed(q_BTNR, latent_BSR, value_rank, allowed_BTS, indexer, topk, mass)
        scores_BTS = indexer_scores(indexer.query.q_BTIC, indexer.k_BSC, indexer.query.w_BTI)
        if listed and platform() == "cpu":
            # Disallowed keys score -inf, sort last, and stay disallowed where fewer than topk are
            # allowed.
            scores_Bk, index_Bk = jax.lax.top_k(masked_scores(scores_BTS, allowed_BTS)[:, 0], topk)
            latent_BSR = jnp.take_along_axis(latent_BSR, index_Bk[:, :, None], axis=1)
            allowed_BTS = top_p_keys(
                scores_Bk[:, None],
                jnp.take_along_axis(allowed_BTS, index_Bk[:, None], axis=2),
                mass,
            )
        else:
            allowed_BTS = top_p_keys(scores_BTS, select_topk(scores_BTS, allowed_BTS, topk), mass)
    elif estimate is not None:
        estimate_BSR = dequantise(estimate, latent_BSR.shape[-1])
        logits_BNTS = jnp.einsum(
            "BTNR,BSR->BNTS", q_BTNR, estimate_BSR, preferred_element_type=jnp.float32
        )
        allowed_BTS = keep_by_estimate(logits_BNTS, allowed_BTS, mass, groups=1)[:, 0]
    with jax.named_scope("latent_attention"):
        logits_BNTS = jnp.einsum(
            "BTNR,BSR->BNTS", q_BTNR, latent_BSR, preferred_element_type=jnp.float32
        )
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


def attend_listed(
    q_B1NR: Array,
    latent_BSR: Array,
    value_rank: int,
    allowed_B1S: Array,
    indexer: IndexerInputs,
    topk: int,
    mass: float,
) -> Array:
    """One query a row over latents that are rows: what the kernels of `attend_tiles` do, by XLA."""
    query = indexer.query
    listed = decode_selection.select_reference(
        query.q_BTIC[:, 0], indexer.k_BSC, query.w_BTI[:, 0], allowed_B1S[:, 0], topk, mass
    )
    with jax.named_scope("latent_attention"):
        return sparse_decode.decode_reference(q_B1NR[:, 0], latent_BSR, value_rank, *listed)[
            :, None
        ]


def attend_tiles(
    q_B1NR: Array,
    tiles_BSn2L: Array,
    value_rank: int,
    allowed_B1S: Array,
    indexer: IndexerInputs,
    topk: int,
    mass: float,
) -> Array:
    """One query a row, by the kernels, under whatever mesh is ambient: each device has its rows'
    latents whole, and its heads' queries. The list of a row is made by every device that has heads
    of it. Where there is no TPU, which only a test asks for, the kernels are interpreted.
    """
    mesh, device = jax.sharding.get_abstract_mesh(), ambient_device()
    interpret = device.platform != "tpu"

    def local(q_BNR, tiles_BSn2L, q_BIC, k_BSC, w_BI, allowed_BS):
        index_Bk, count_B = decode_selection.select_tpu(
            q_BIC, k_BSC, w_BI, allowed_BS, topk, mass, interpret=interpret
        )
        cores = getattr(device, "num_cores", None) or 1
        parts = 1 if q_BNR.shape[0] % cores == 0 else cores
        return sparse_decode.decode_tpu(
            q_BNR, tiles_BSn2L, value_rank, index_Bk, count_B, parts=parts, interpret=interpret
        )

    if not (mesh.empty or mesh.size == 1):
        rows, heads = P(RULES["batch"]), P(RULES["batch"], RULES["heads"])
        local = jax.shard_map(
            local, in_specs=(heads, *[rows] * 5), out_specs=heads, check_vma=False
        )
    with jax.named_scope("latent_attention"):
        query = indexer.query
        return local(
            q_B1NR[:, 0],
            tiles_BSn2L,
            query.q_BTIC[:, 0],
            indexer.k_BSC,
            query.w_BTI[:, 0],
            allowed_B1S[:, 0],
        )[:, None]
