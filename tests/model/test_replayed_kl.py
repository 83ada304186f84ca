"""With a record the indexer learns on the recorded keys: its KL and gradients against a float64
loop, in every form of attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import IndexerQuery
from model.attention.reference import IndexerInputs, attend_expanded
from model.attention.selected import attend_selected
from model.attention.table import KERNELS
from model.attention.tiled import attend_tiled
from tests import tiny

B, T, N, R, V, I, C, TOPK = 4, tiny.T, 2, 8, 6, 3, 4, 4
SEGMENTS = tiny.batch_of()["segments"]  # packed, full, padded on either side


@functools.cache
def inputs() -> tuple[jax.Array, ...]:
    """(q, latent, the indexer's q, w and k): one key for all heads, as absorbed MLA has it."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, R), (B, T, R), (B, T, I, C), (B, T, I), (B, T, C)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@functools.cache
def record() -> np.ndarray:
    """Keys of each query, drawn and not selected: of earlier tokens of its own segment, in order,
    TOPK at most. A tenth of the queries has none.
    """
    rng, segments_BT = np.random.default_rng(1), np.asarray(SEGMENTS)
    given_BTk = np.full((B, T, TOPK), -1, np.int32)
    for b, t in np.ndindex(B, T):
        own = np.flatnonzero(segments_BT[b, : t + 1] == segments_BT[b, t])
        if segments_BT[b, t] and rng.random() < 0.9:
            keys = np.sort(rng.permutation(own)[:TOPK])
            given_BTk[b, t, : len(keys)] = keys
    return given_BTk


def expanded(q_BTNR, latent_BSR, indexer, attend, **options):
    k_BSNR = jnp.broadcast_to(latent_BSR[:, :, None], (B, T, N, R))
    return attend(
        q_BTNR, k_BSNR, k_BSNR[..., :V], SEGMENTS, indexer, stage="sparse", topk=TOPK, **options
    )


FORMS = {
    "chunks": functools.partial(
        expanded, attend=functools.partial(attend_expanded, query_chunk=10, causal_parts=1)
    ),
    "gathered": functools.partial(
        lambda q, latent, indexer, **sizes: attend_selected(q, latent, SEGMENTS, indexer, **sizes),
        value_rank=V,
        topk=TOPK,
        query_chunk=10,
        causal_parts=1,
    ),
    "tiles": functools.partial(
        expanded, attend=functools.partial(attend_tiled, kernels=KERNELS["cpu"])
    ),
}


@functools.cache
def kl_and_gradients(form: str, replays: bool = True):
    given_BTk = jnp.asarray(record()) if replays else None

    def kl(arrays):
        q, latent, index_q, index_w, index_k = arrays
        indexer = IndexerInputs(IndexerQuery(index_q, index_w), index_k, given_BTk)
        _, stats, _ = FORMS[form](q, latent, indexer)
        return stats.kl

    return jax.device_get(jax.jit(jax.value_and_grad(kl))(inputs()))


def by_loop():
    """The sum over queries of KL(p over S || softmax of the scores over S), S the recorded keys,
    or the TOPK latest where there are none (arXiv 2512.02556, eq. 4), with its gradient by hand:
    that of a score is softmax - p, as p is a constant.
    """
    q, latent, index_q, index_w, index_k = (np.asarray(x, np.float64) for x in inputs())
    grads = [np.zeros_like(x) for x in (index_q, index_w, index_k)]
    segments_BT, total = np.asarray(SEGMENTS), 0.0
    for b, t in np.ndindex(B, T):
        if not segments_BT[b, t]:
            continue
        keys = [s for s in record()[b, t] if s >= 0]
        if not keys:
            latest = range(max(t - TOPK + 1, 0), t + 1)
            keys = [s for s in latest if segments_BT[b, s] == segments_BT[b, t]]
        weights_NS = np.exp([[q[b, t, n] @ latent[b, s] for s in keys] for n in range(N)])
        p_S = (weights_NS / weights_NS.sum(1, keepdims=True)).mean(0)
        dot_SI = np.array([index_q[b, t] @ index_k[b, s] for s in keys])
        weight_S = np.exp(np.maximum(dot_SI, 0) @ index_w[b, t])
        predicted_S = weight_S / weight_S.sum()
        total += np.sum(p_S * np.log(p_S / predicted_S))
        for s, slope, dot_I in zip(keys, predicted_S - p_S, dot_SI, strict=True):
            reached_I = slope * index_w[b, t] * (dot_I > 0)
            grads[0][b, t] += reached_I[:, None] * index_k[b, s]
            grads[1][b, t] += slope * np.maximum(dot_I, 0)
            grads[2][b, s] += reached_I @ index_q[b, t]
    return total, grads


@pytest.mark.parametrize(
    "form", ["chunks", "gathered", pytest.param("tiles", marks=pytest.mark.kernel)]
)
def test_the_loss_is_over_the_recorded_keys_and_reaches_the_indexer_alone(form):
    """Gradients of size 1; float32 against float64."""
    kl, (to_q, to_latent, *to_indexer) = kl_and_gradients(form)
    expected, gradients = by_loop()
    np.testing.assert_allclose(kl, expected, rtol=1e-5)
    for found, by_hand in zip(to_indexer, gradients, strict=True):
        assert np.abs(by_hand).max() > 0.5
        np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-5)
    assert not to_q.any() and not to_latent.any(), "the target is a constant"


def test_the_indexer_s_own_keys_would_be_another_loss():
    kl, _ = kl_and_gradients("chunks", replays=False)
    assert abs(kl - by_loop()[0]) > 1
