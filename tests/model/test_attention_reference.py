"""Attention over chunks of queries, over latents, and never over an [L, L] array."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import IndexerQuery
from model.attention import reference
from model.attention.caches import LatentCache
from model.attention.decode import attend_gathered, attend_masked
from model.attention.reference import IndexerInputs, attend_expanded, part_ends
from model.attention.table import latent_form
from model.config import STAGES
from tests import tiny

N, H, V, I, C = 2, 8, 6, 3, 4
TOPK = 5


def inputs(batch: int, length: int, seed: int = 0):
    """(q, k, v, indexer) of random normals; queries scaled to logits of size 1."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = (
        draw(batch, length, N, H) * H**-0.5,
        draw(batch, length, N, H),
        draw(batch, length, N, V),
    )
    return (
        q,
        k,
        v,
        IndexerInputs(
            IndexerQuery(draw(batch, length, I, C), draw(batch, length, I) * (I * C) ** -0.5),
            draw(batch, length, C),
        ),
    )


def loss(arrays, segments_BT, stage, topk, query_chunk, causal_parts=1):
    """Something that depends on every output, with a gradient to every input."""
    q, k, v, indexer = arrays
    out, stats, _ = attend_expanded(
        q,
        k,
        v,
        segments_BT,
        indexer,
        stage=stage,
        topk=topk,
        query_chunk=query_chunk,
        causal_parts=causal_parts,
    )
    return jnp.sum(jnp.sin(out)) + stats.kl, (out, stats)


value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(2, 3, 4, 5))


@pytest.mark.parametrize("stage", STAGES)
def test_chunks_of_queries_change_nothing(stage):
    """One chunk, three, and four of which the last is ragged: each query's arithmetic is the same,
    gradients to keys are summed in another order.
    """
    arrays, segments_BT = inputs(4, tiny.T), tiny.batch_of()["segments"]
    whole, cut, ragged = (
        value_and_gradient(arrays, segments_BT, stage, TOPK, chunk) for chunk in (512, 8, 7)
    )
    tiny.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    tiny.assert_close(ragged, whole, rtol=1e-5, atol=1e-5)


LONG = (
    ((1, 90), (2, 70), (0, 10)),
    ((1, 170),),
)  # 170 queries: of two parts 85 each, of three or more, of 64 at least, 64, 64 and 42


@pytest.mark.heavy
@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_the_sequence_change_nothing(stage, monkeypatch):
    """Each part sees the keys up to its own end only, in one chunk or several, ragged ones
    included: what it does not see was masked before.
    """
    monkeypatch.setattr(reference, "MIN_PART", 64)
    arrays, segments_BT = inputs(2, 170), tiny.batch_of(LONG, width=170)["segments"]
    whole = value_and_gradient(arrays, segments_BT, stage, TOPK, 512, 1)
    for chunk, parts in ((512, 2), (512, 8), (24, 2)):
        tiny.assert_close(
            value_and_gradient(arrays, segments_BT, stage, TOPK, chunk, parts),
            whole,
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_part_is_no_smaller_than_pays():
    assert part_ends(256, 4) == [128, 256] and part_ends(2048, 4) == [512, 1024, 1536, 2048]
    assert part_ends(170, 8) == [128, 170] and part_ends(40, 4) == [40]


def test_parts_skip_what_causality_masks():
    """Of two parts three quarters of the scores are computed, of four five eighths: counted by the
    compiler on the forward pass, matmuls being most of it.
    """
    arrays, segments_BT = inputs(1, 512), jnp.ones((1, 512), jnp.int32)

    def operations(parts):
        attend = functools.partial(
            attend_expanded, stage="dense", topk=TOPK, query_chunk=512, causal_parts=parts
        )
        costs = (
            jax.jit(lambda q, k, v: attend(q, k, v, segments_BT, None)[0])
            .lower(*arrays[:3])
            .compile()
            .cost_analysis()
        )
        assert costs is not None
        return costs["flops"]

    assert operations(2) / operations(1) == pytest.approx(3 / 4, rel=0.03)
    assert operations(4) / operations(1) == pytest.approx(5 / 8, rel=0.03)


def test_topk_of_everything_is_dense():
    """With as many keys as there are, the selection, the output and the loss are those of the dense
    warm-up.
    """
    arrays, segments_BT = inputs(4, tiny.T), tiny.batch_of()["segments"]
    sparse, dense = (
        value_and_gradient(arrays, segments_BT, stage, topk, 512)
        for stage, topk in (("sparse", tiny.T), ("warmup", TOPK))
    )
    (sparse_loss, (sparse_out, sparse_stats)), sparse_gradient = sparse
    (dense_loss, (dense_out, dense_stats)), dense_gradient = dense
    tiny.assert_close(
        (sparse_loss, sparse_out, sparse_stats.kl),
        (dense_loss, dense_out, dense_stats.kl),
        rtol=1e-6,
    )
    tiny.assert_close(sparse_gradient, dense_gradient, rtol=1e-6)
    less_out = value_and_gradient(arrays, segments_BT, "sparse", TOPK, 512)[0][1][0]
    assert jnp.max(jnp.abs(less_out - dense_out)) > 0.1, "with fewer keys it is something else"


def test_padding_attends_to_nothing():
    arrays, segments_BT = inputs(4, tiny.T), tiny.batch_of()["segments"]
    out_BTNV = value_and_gradient(arrays, segments_BT, "sparse", TOPK, 512)[0][1][0]
    assert not jnp.any(out_BTNV[segments_BT == 0])


def latent_inputs(queries: int):
    rng = np.random.default_rng(0)
    _, _, _, indexer = inputs(3, 16)
    q, latent = (
        jnp.asarray(rng.normal(size=(3, 16, N, 10)), jnp.float32),
        jnp.asarray(rng.normal(size=(3, 16, 10)), jnp.float32),
    )
    allowed_BTS = (
        jnp.tril(jnp.ones((16, 16), bool))[None]
        & (jnp.arange(16) >= jnp.asarray([[0], [5], [14]]))[:, None]
    )  # ragged padding on the left
    return (
        q[:, -queries:],
        latent,
        allowed_BTS[:, -queries:],
        indexer._replace(query=jax.tree.map(lambda x: x[:, -queries:], indexer.query)),
    )


@pytest.mark.parametrize("ties", [False, True])
def test_gathered_latents_are_the_masked_ones(ties):
    """One query a row reads the selected latents only, several mask the others: the same attention,
    also when most scores are relu's exact 0.
    """
    q, latent, allowed_BTS, indexer = latent_inputs(queries=4)
    if ties:  # heads' weights of one sign leave scores 0, or -0, wherever no head fires
        indexer = indexer._replace(
            query=IndexerQuery(
                indexer.query.q_BTIC.at[:, :, 1:].set(0.0), -jnp.abs(indexer.query.w_BTI)
            )
        )
    cache = LatentCache(latent, indexer.k_BSC)
    options: dict = {"value_rank": 7, "topk": TOPK}
    options["record"] = True
    masked, chosen = attend_masked(q, cache, allowed_BTS, indexer.query, **options)

    def gathered(t):
        q_B1NR, allowed_B1S, query = jax.tree.map(
            lambda x_BT: x_BT[:, t : t + 1], (q, allowed_BTS, indexer.query)
        )
        assert latent_form(cache, 1, TOPK) == attend_gathered
        return attend_gathered(q_B1NR, cache, allowed_B1S, query, **options)

    outs, selected = zip(*[gathered(t) for t in range(4)], strict=True)
    tiny.assert_close(jnp.concatenate(outs, axis=1), masked, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate(selected, axis=1), chosen)


def test_the_backward_pass_does_not_select_again():
    """Nor does it in a layer that is computed again and keeps what has attention's name."""

    def total(arrays, segments_BT):
        return loss(arrays, segments_BT, "sparse", TOPK, query_chunk=512)[0]

    arrays, segments_BT = inputs(2, 24), jnp.ones((2, 24), jnp.int32)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    searches = [
        str(jax.make_jaxpr(function)(arrays, segments_BT)).count("= scan[")
        for function in (total, jax.grad(total), jax.grad(jax.checkpoint(total, policy=policy)))
    ]
    assert searches == [2, 2, 2], "of the threshold and of the last of equal scores"


LENGTH = 512  # no other dimension of the model below is this long


@pytest.mark.heavy
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_length_by_length(stage):
    """Neither the forward nor the backward pass of the whole model makes an array of which two
    dimensions are the length of the row, masks included: with chunks of 64 queries memory is linear
    in length, but for a bit a selected pair. Read from the program as it is handed to the compiler.
    """
    config = tiny.model_config(query_chunk=64, logit_chunk=128, num_nextn_predict_layers=1)
    batch = tiny.batch_of((((1, 300), (2, 200), (0, 12)),), width=LENGTH)

    def total(params, router):
        output = tiny.output_of(config, {"params": params, "router": router}, batch, stage)
        return jnp.sum(output.hidden_BTD) + jnp.sum(output.stats.indexer.kl)

    variables = tiny.variables(config)
    assert not squares(
        jax.jit(jax.grad(total)).lower(variables["params"], variables["router"]).as_text()
    )


def test_the_compiler_makes_no_square_either():
    arrays, segments_BT = inputs(1, LENGTH), jnp.ones((1, LENGTH), jnp.int32)
    lowered = functools.partial(value_and_gradient.lower, arrays, segments_BT, "sparse", TOPK)
    program = lowered(64).compile().as_text()
    assert program is not None and not squares(program)
    assert squares(lowered(LENGTH).as_text()), "in one chunk there is one: the search can find it"


def squares(program: str) -> set[str]:
    """Array types of StableHLO ("tensor<1x512x512xf32>") or HLO ("f32[1,512,512]") with LENGTH in
    them twice.
    """
    shapes = set(re.findall(r"tensor<([\dx]+)x\w+>", program)) | set(
        re.findall(r"\w+\[([\d,]+)\]", program)
    )
    return {shape for shape in shapes if re.split("[x,]", shape).count(str(LENGTH)) > 1}
