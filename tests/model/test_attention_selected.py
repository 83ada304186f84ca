"""Attention over gathered latents is sparse attention by chunks: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import IndexerQuery
from model.attention.reference import IndexerInputs, attend_expanded
from model.attention.selected import attend_selected
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny

B, T, N, R, ROPE, I, C = 4, 150, 2, 6, 4, 3, 4
LAYOUT = (
    ((1, 30), (2, 115), (0, 5)),
    ((1, 150),),
    ((0, 20), (1, 130)),
    ((1, 10), (2, 5), (3, 135)),
)  # packed, full, padded on the left


def inputs(seed: int = 0):
    """(q, latent, indexer): the indexer's numbers have few bits, so that its scores are exact in
    any order, and many of them are equal.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def whole(*shape):
        return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) / 2

    query = IndexerQuery(whole(B, T, I, C), whole(B, T, I))
    return draw(B, T, N, R + ROPE), draw(B, T, R + ROPE), IndexerInputs(query, whole(B, T, C))


@functools.cache
def segments():
    return tiny.batch_of(LAYOUT, width=T)["segments"]


def by_latents(topk: int, q_BTNR, latent_BSR, segments_BT, indexer):
    return attend_selected(
        q_BTNR,
        latent_BSR,
        segments_BT,
        indexer,
        value_rank=R,
        topk=topk,
        query_chunk=32,
        causal_parts=2,
        record=True,
    )


def by_chunks(topk: int, q_BTNR, latent_BSR, segments_BT, indexer):
    """One key-value head for all: the latent with its key, and its first channels."""
    k_BSNR = jnp.broadcast_to(latent_BSR[:, :, None], (B, T, N, R + ROPE))
    return attend_expanded(
        q_BTNR,
        k_BSNR,
        k_BSNR[..., :R],
        segments_BT,
        indexer,
        stage="sparse",
        topk=topk,
        query_chunk=512,
        causal_parts=1,
        record=True,
    )


def result(form, topk: int, mesh=None):
    """Returns ((loss, (out, stats, selected)), gradients); every output is in the loss."""

    def loss(arrays, segments_BT):
        q_BTNR, latent_BSR, indexer = arrays
        out, stats, selected = form(topk, q_BTNR, latent_BSR, segments_BT, indexer)
        return jnp.sum(jnp.sin(out)) + stats.kl, (out, stats, selected)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        return function(inputs(), segments())
    with jax.set_mesh(mesh):
        return jax.device_get(function(inputs(), segments()))


def assert_same(found, expected):
    """Sums of a few hundred float32 terms in another order; the selected keys are equal."""
    np.testing.assert_array_equal(found[0][1][2], expected[0][1][2])
    tiny.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("topk", [1, 7, 120, T])
def test_gathered_is_masked(topk):
    assert_same(result(by_latents, topk), result(by_chunks, topk))


def test_small_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr("model.attention.selected.GATHERED", 7 * B * 9 * (R + ROPE))
    assert_same(result(by_latents, 9), result(by_chunks, 9))


@pytest.mark.mesh
def test_the_mesh_changes_nothing():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert_same(result(by_latents, 7, mesh), result(by_latents, 7))


@pytest.mark.heavy
def test_a_model_is_the_same_by_either_form():
    """Loss and every gradient of a whole model, the gate included."""
    batch = tiny.batch_of()
    small = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}

    def loss(variables, form):
        config = tiny.model_config(attention_form=form, **small)
        output = tiny.output_of(config, variables, batch, "sparse")
        return jnp.sum(jnp.sin(output.hidden_BTD)) + jnp.sum(output.stats.indexer.kl)

    variables = tiny.variables(tiny.model_config(**small))
    with jax.default_matmul_precision("highest"):
        found, expected = (
            jax.jit(jax.value_and_grad(functools.partial(loss, form=form)))(variables)
            for form in ("gathered", "chunks")
        )
    tiny.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_backward_pass_does_not_select_again():
    def loss(arrays, segments_BT):
        q_BTNR, latent_BSR, indexer = arrays
        return jnp.sum(by_latents(7, q_BTNR, latent_BSR, segments_BT, indexer)[0])

    policy = jax.checkpoint_policies.save_only_these_names("attention")
    forward, both = (
        str(jax.make_jaxpr(function)(inputs(), segments())).count("= top_k[")
        for function in (loss, jax.grad(jax.checkpoint(loss, policy=policy)))
    )
    assert forward == both == 2, "once for each of the two parts"
