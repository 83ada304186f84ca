"""The forms of attention over a cache are one function: a gather, kernels over tiles, a mask.

So they are with all of attention, and with the fewest keys that have a share of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import sparse_decode
from kernels.reference import IndexerQuery, indexer_scores, select_topk
from kernels.sparse_decode import CROSSOVER, from_tiles, in_tiles, to_tiles
from model.attention.caches import KeyValueCache, LatentCache
from model.attention.decode import attend_cached, attend_listed, attend_tiles
from model.attention.int4 import quantise
from model.attention.reference import IndexerInputs
from model.attention.table import FEW, latent_form
from model.cache import Cache
from model.decode import prefill
from model.decode_weights import decode_weights
from model.heads import logits_of
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny

pytestmark = pytest.mark.kernel

B, N, S, R, V, TOPK = 4, 4, 40, 24, 16, 12
EXACT = 1e-5  # float32, products summed in another order


def inputs(queries: int = 1):
    """Rows of several lengths, one of which may attend to nothing; the last `queries` tokens
    ask.
    """
    rng = np.random.default_rng(0)
    q, latent = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, queries, N, R), (B, S, R))
    )
    iq, ik, iw = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, queries, 2, 8), (B, S, 8), (B, queries, 2))
    )
    first_B1 = np.array([[0], [5], [33], [S]])
    allowed_BTS = (np.arange(S) >= first_B1)[:, None] & (
        np.arange(S) <= np.arange(S - queries, S)[:, None]
    )
    return q, latent, jnp.asarray(allowed_BTS), IndexerInputs(IndexerQuery(iq, iw), ik)


def attend_latent(q, latent, allowed, indexer=None, *, tiles=False, top_p=1.0, estimate=None):
    """Attention by the form that the table chooses, as `LatentAttention` calls it."""
    query, k_BSC = indexer[:2] if indexer is not None else (None, jnp.zeros((B, S, 0)))
    rows = to_tiles(latent) if tiles else latent
    cache = LatentCache(rows, k_BSC, estimate, top_p, "tiles" if tiles else "rows")
    attend = latent_form(cache, q.shape[1], None if query is None else TOPK)
    return attend(q, cache, allowed, query, value_rank=V, topk=TOPK)[0]


def selected_latent(q, latent, allowed, indexer, *, tiles=False, top_p=1.0):
    """The keys that it records."""
    cache = LatentCache(
        to_tiles(latent) if tiles else latent,
        indexer.k_BSC,
        None,
        top_p,
        "tiles" if tiles else "rows",
    )
    attend = latent_form(cache, q.shape[1], TOPK)
    return attend(q, cache, allowed, indexer.query, value_rank=V, topk=TOPK, record=True)[1]


def fewest(p_S: np.ndarray, top_p: float) -> np.ndarray:
    """The largest of a distribution until they have the share, by sorting."""
    order = np.argsort(-p_S, kind="stable")
    kept_S = np.zeros(p_S.shape, bool)
    kept_S[order[: int(np.argmax(np.cumsum(p_S[order]) >= top_p)) + 1]] = True
    return kept_S


def softmax(logits_S: np.ndarray, allowed_S: np.ndarray) -> np.ndarray:
    logits_S = np.asarray(logits_S, np.float64)
    weights_S = np.where(allowed_S, np.exp(logits_S - np.max(logits_S)), 0.0)
    return weights_S / max(weights_S.sum(), 1e-300)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_gather_a_mask_and_the_kernels_are_one(top_p, monkeypatch):
    q, latent, allowed, indexer = inputs()
    gathered = attend_latent(q, latent, allowed, indexer, top_p=top_p)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr("model.attention.table.platform", lambda: "gpu")
        on_a_gpu.setattr(jax.lax, "top_k", None)
        assert latent_form(LatentCache(latent, indexer.k_BSC), 1, TOPK) == attend_listed
        listed = attend_latent(q, latent, allowed, indexer, top_p=top_p)
        recorded = [selected_latent(q, latent, allowed, indexer, top_p=top_p)]
    tiny.assert_close(listed, gathered, atol=EXACT)
    by_kernels = attend_latent(q, latent, allowed, indexer, tiles=True, top_p=top_p)
    tiny.assert_close(by_kernels, gathered, atol=EXACT)
    # Two queries a row are read one by one, more than a few are masked; each is the same.
    for count, tiles in ((2, False), (2, True), (FEW + 1, False), (FEW + 1, True)):
        several = jax.tree.map(
            lambda x, n=count: jnp.repeat(x, n, axis=1), (q, allowed, indexer.query)
        )
        each = IndexerInputs(several[2], indexer.k_BSC)
        found = attend_latent(several[0], latent, several[1], each, tiles=tiles, top_p=top_p)
        for t in range(count):
            tiny.assert_close(found[:, t : t + 1], gathered, atol=EXACT)
    recorded += [
        selected_latent(q, latent, allowed, indexer, top_p=top_p, tiles=tiles)
        for tiles in (False, True)
    ]
    for found in recorded[1:]:
        np.testing.assert_array_equal(found, recorded[0])
    assert not jnp.any(gathered[-1]) and jnp.all(jnp.any(gathered[:-1], axis=-1))


def test_with_an_indexer_the_fewest_of_the_selected_are_read():
    q, latent, allowed, indexer = inputs()
    found = attend_latent(q, latent, allowed, indexer, top_p=0.6)
    scores = indexer_scores(indexer.query.q_BTIC, indexer.k_BSC, indexer.query.w_BTI)
    selected, kept = np.asarray(select_topk(scores, allowed, TOPK)), np.zeros((B, 1, S), bool)
    for b in range(B - 1):
        kept[b, 0] = fewest(softmax(np.asarray(scores[b, 0]), selected[b, 0]), 0.6)
    assert np.all(kept.sum(axis=-1)[:-1] < selected.sum(axis=-1)[:-1])
    tiny.assert_close(found, attend_latent(q, latent, jnp.asarray(kept)), atol=EXACT)


def test_without_one_every_head_has_its_share_of_the_estimate():
    q, latent, allowed, _ = inputs()
    found = attend_latent(q, latent, allowed, top_p=0.6, estimate=quantise(latent, R))
    kept = np.zeros((B, 1, S), bool)
    estimate = from_tiles(to_tiles(latent), R)  # as it was
    step = (estimate.max(axis=-1, keepdims=True) - estimate.min(axis=-1, keepdims=True)) / 15
    estimate = estimate.min(axis=-1, keepdims=True) + step * jnp.round(
        (estimate - estimate.min(axis=-1, keepdims=True)) / step
    )
    for b in range(B - 1):
        for n in range(N):
            kept[b, 0] |= fewest(
                softmax(np.asarray(estimate[b] @ q[b, 0, n]), np.asarray(allowed[b, 0])), 0.6
            )
    assert (
        np.all(kept.sum(axis=-1)[:-1] <= np.asarray(allowed).sum(axis=-1)[:-1])
        and kept.sum() < np.asarray(allowed).sum()
    )
    tiny.assert_close(found, attend_latent(q, latent, jnp.asarray(kept)), atol=EXACT)


def test_heads_that_share_keys_keep_them_together():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, 1, 4, 8), (B, S, 2, 8), (B, S, 2, 8))
    )
    _, _, allowed, _ = inputs()
    found = attend_cached(q, KeyValueCache(k, v, quantise(k, 8), 0.6), allowed)
    low, high = k.min(axis=-1, keepdims=True), k.max(axis=-1, keepdims=True)
    estimate = low + (high - low) / 15 * jnp.round((k - low) / ((high - low) / 15))
    for head in range(2):
        mine, kept = slice(2 * head, 2 * head + 2), np.zeros((B, 1, S), bool)
        for b in range(B - 1):
            for n in (2 * head, 2 * head + 1):
                kept[b, 0] |= fewest(
                    softmax(
                        np.asarray(estimate[b, :, head] @ q[b, 0, n]), np.asarray(allowed[b, 0])
                    ),
                    0.6,
                )
        alone = attend_cached(
            q[:, :, mine],
            KeyValueCache(k[:, :, head : head + 1], v[:, :, head : head + 1]),
            jnp.asarray(kept),
        )
        tiny.assert_close(found[:, :, mine], alone, atol=EXACT)


def test_the_kernels_on_a_mesh_are_those_on_one_device():
    """Rows over two, heads over two."""
    q, latent, allowed, indexer = inputs()
    cache = LatentCache(to_tiles(latent), indexer.k_BSC, layout="tiles")
    attend = functools.partial(attend_tiles, value_rank=V, topk=TOPK)
    alone, _ = attend(q, cache, allowed, indexer.query)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, expert=1, tensor=2), jax.devices()[:4])):
        shared, _ = jax.jit(attend)(q, cache, allowed, indexer.query)
    tiny.assert_close(jax.device_get(shared), jax.device_get(alone), atol=EXACT)


def test_the_table():
    assert in_tiles("tpu", CROSSOVER, 2_048) and not in_tiles("tpu", CROSSOVER - 1, 2_048)
    assert not in_tiles("tpu", 2 * CROSSOVER, 2 * CROSSOVER), "every token is selected"
    assert not in_tiles("cpu", 10 * CROSSOVER, 2_048) and not in_tiles("gpu", 10 * CROSSOVER, 2_048)


CONFIG = tiny.model_config(num_hidden_layers=1, num_nextn_predict_layers=0)
HYBRID = tiny.model_config(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    layer_types=("mla", "gqa"),
    num_nextn_predict_layers=0,
    indexer={"n_heads": 0},
)


def decoded(config, stage: str, top_p: float, steps: int = 3) -> jax.Array:
    """Logits after a prompt and each of some tokens."""
    tokens_BT = tiny.batch_of((((1, 24),), ((1, 24),)))["tokens"]
    variables, count_B = tiny.variables(config), jnp.asarray([tiny.T - steps - 3, tiny.T - steps])
    cache, hidden_BD, _ = prefill(
        config, variables, tokens_BT[:, :-steps], count_B, tiny.T, stage, top_p
    )
    weights = decode_weights(config, variables, len(hidden_BD))
    found = [logits_of(config, variables["params"], hidden_BD)]
    step = jax.jit(
        lambda tokens_B, cache: tiny.decode_step(config, weights, tokens_B, cache, stage)
    )
    for t in range(steps):
        tokens_B = jnp.take_along_axis(tokens_BT, count_B[:, None] + t, axis=1)[:, 0]
        cache, logits_BV = step(tokens_B, cache)
        found.append(logits_BV)
    return jnp.stack(found, axis=1)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_model_decodes_from_tiles_what_it_does_from_rows(top_p, monkeypatch):
    """Prefill fills the tiles, each step reads them. Sums of float32 in another order, EXACT in
    attention, and a layer behind it ten times as much.
    """
    expected = decoded(CONFIG, "sparse", top_p)
    monkeypatch.setattr(sparse_decode, "in_tiles", lambda platform, slots, topk: True)
    for stage, layout in (("sparse", "tiles"), ("dense", "rows")):
        attention = Cache.empty(CONFIG, 2, tiny.T, stage).layers[0].attention
        assert isinstance(attention, LatentCache) and attention.layout == layout
    tiny.assert_close(decoded(CONFIG, "sparse", top_p), expected, atol=10 * EXACT)


@pytest.mark.parametrize(
    ("config", "stage"), [(CONFIG, "sparse"), (HYBRID, "dense")], ids=["indexer", "four bits"]
)
def test_a_smaller_share_is_another_model_and_almost_all_is_not(config, stage):
    """The prompt is read in full either way; with a share of almost 1 what is left out weighs less
    than 1e-5.
    """
    whole = decoded(config, stage, 1.0)
    tiny.assert_close(decoded(config, stage, 1 - 1e-6), whole, atol=1e-3)
    half = decoded(config, stage, 0.5)
    tiny.assert_close(half[:, 0], whole[:, 0], atol=1e-5)
    assert jnp.max(jnp.abs(half[:, 1:] - whole[:, 1:])) > 0.1
