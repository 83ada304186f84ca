"""Attention by tiles is attention by chunks: in outputs, the indexer's loss and every gradient.

On one device, and on meshes whose `tensor` axis divides heads for attention and queries for the
selection and the loss.
"""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from kernels.reference import IndexerQuery
from model.attention.reference import IndexerInputs, attend_expanded
from model.attention.table import sequence_form
from model.attention.tiled import KERNELS, MIN_TILED, attend_tiled, queries_at_once
from model.config import STAGES
from model.mesh import MeshConfig
from model.segments import causal_mask
from model.sharding import RULES, make_mesh
from tests import tiny

pytestmark = pytest.mark.kernel

B, T, N, H, V, I, C, TOPK = 4, 300, 4, 8, 6, 3, 4, 20
LAYOUT = (
    ((1, 130), (2, 150), (0, 20)),
    ((1, 300),),
    ((0, 40), (1, 260)),
    ((1, 10), (2, 5), (3, 285)),
)  # packed, full, padded on the left


def inputs(seed: int = 0):
    """(q, k, v, indexer): numbers of few bits, so that the indexer's scores are exact in any order
    and a selection cannot turn on rounding.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def whole(*shape):
        return jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) / 4

    query = IndexerQuery(whole(B, T, I, C), whole(B, T, I))
    return (
        draw(B, T, N, H) * H**-0.5,
        draw(B, T, N, H),
        draw(B, T, N, V),
        IndexerInputs(query, whole(B, T, C)),
    )


@functools.cache
def segments():
    return tiny.batch_of(LAYOUT, width=T)["segments"]


def loss(arrays, segments_BT, attend):
    """Something that depends on every output, with a gradient to every input."""
    out, stats, _ = attend(*arrays[:3], segments_BT, arrays[3])
    return jnp.sum(jnp.sin(out)) + stats.kl, (out, stats)


def result(attend, mesh=None):
    """Returns ((loss, (out, stats)), gradients)."""
    function = jax.jit(jax.value_and_grad(functools.partial(loss, attend=attend), has_aux=True))
    if mesh is None:
        return function(inputs(), segments())
    with jax.set_mesh(mesh):
        return jax.device_get(function(inputs(), segments()))


@functools.cache
def by_chunks(stage: str):
    return result(
        functools.partial(attend_expanded, stage=stage, topk=TOPK, query_chunk=512, causal_parts=1)
    )


def assert_same(found, expected):
    """Sums of a few hundred float32 terms in another order; the loss sums a hundred thousand."""
    tiny.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_tiles_are_chunks(stage, kernels):
    assert_same(
        result(functools.partial(attend_tiled, stage=stage, topk=TOPK, kernels=KERNELS[kernels])),
        by_chunks(stage),
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [((2, 1, 1, 4), "reference"), ((1, 2, 2, 2), "reference"), ((1, 4, 1, 2), "cpu")],
)
def test_the_mesh_changes_nothing(stage, mesh, kernels, monkeypatch):
    monkeypatch.setattr(
        "kernels.indexer_kl.KEYS_AT_ONCE", 128
    )  # three chunks of a row's keys, gathered one after the other
    attend = functools.partial(attend_tiled, stage=stage, topk=TOPK, kernels=KERNELS[kernels])
    assert_same(result(attend, make_mesh(MeshConfig(*mesh))), by_chunks(stage))


def test_devices_that_share_queries_count_their_loss_once(monkeypatch):
    """As on a mesh axis that divides something else, here heads and not queries. The module's
    specs follow the rules that it is imported with.
    """
    monkeypatch.setitem(RULES, "query_blocks", None)
    found = importlib.util.find_spec("model.attention.tiled")
    assert found is not None and found.loader is not None
    own_copy = importlib.util.module_from_spec(found)
    found.loader.exec_module(own_copy)
    attend = functools.partial(
        own_copy.attend_tiled, stage="sparse", topk=TOPK, kernels=KERNELS["reference"]
    )
    assert_same(result(attend, make_mesh(MeshConfig(2, 1, 1, 4))), by_chunks("sparse"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mesh", [None, (2, 2, 1, 2)])
def test_heads_may_share_keys(stage, mesh):
    """Four heads of queries and two of keys and values."""

    def grouped(attend):
        return lambda q, k, v, *rest, **kwargs: attend(q, k[:, :, :2], v[:, :, :2], *rest, **kwargs)

    options = {"stage": stage, "topk": TOPK}
    tiles = functools.partial(attend_tiled, kernels=KERNELS["reference"], **options)
    chunks = functools.partial(attend_expanded, query_chunk=512, causal_parts=1, **options)
    where = None if mesh is None else make_mesh(MeshConfig(*mesh))
    assert_same(result(grouped(tiles), where), result(grouped(chunks)))


def window_of_100(query_segments_BT, query_index_T, key_segments_BS):
    near_TS = query_index_T[:, None] - jnp.arange(key_segments_BS.shape[1]) < 100
    return causal_mask(query_segments_BT, query_index_T, key_segments_BS) & near_TS


def test_another_mask_is_the_same_by_tiles():
    chunks = functools.partial(attend_expanded, query_chunk=128, causal_parts=2)
    tiles = functools.partial(attend_tiled, kernels=KERNELS["cpu"])
    found, expected = (
        result(functools.partial(form, stage="dense", topk=TOPK, mask=window_of_100))
        for form in (tiles, chunks)
    )
    assert_same(found, expected)
    assert found[0][0] != by_chunks("dense")[0][0], "the window hides something"


def test_keys_of_all_heads_live_a_chunk_at_a_time(monkeypatch):
    """As a block is trained, computed again in the backward pass. A device has one row of B, two of
    N heads and, of chunks of 128 keys, three.
    """
    monkeypatch.setattr("kernels.indexer_kl.KEYS_AT_ONCE", 128)
    attend = functools.partial(attend_tiled, stage="sparse", topk=TOPK, kernels=KERNELS["cpu"])
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 1, 2))):
        gradient = jax.jit(
            jax.grad(
                jax.checkpoint(lambda arrays, segments_BT: loss(arrays, segments_BT, attend)[0])
            )
        )
        program = gradient.lower(inputs(), segments()).as_text()
    assert f"tensor<1x{N}x128x{H}xf32>" in program, "a chunk"
    assert f"tensor<3x1x{N}x128x{H}xf32>" not in program, "all of them"


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "dots"])
def test_a_model_is_the_same_by_tiles(remat):
    """Loss and every gradient of a whole model, MTP and gate included, the kernels interpreted;
    with `dots` the backward pass keeps what attention gave.
    """
    batch = tiny.batch_of()

    def total(params, router, config):
        output = tiny.output_of(config, {"params": params, "router": router}, batch, "sparse")
        return jnp.sum(jnp.sin(output.hidden_BTD)) + jnp.sum(output.stats.indexer.kl)

    variables = tiny.variables(tiny.model_config())
    with jax.default_matmul_precision("highest"):
        tiles, chunks = (
            jax.jit(jax.value_and_grad(total), static_argnums=2)(
                variables["params"],
                variables["router"],
                tiny.model_config(attention_form=form, remat=remat),
            )
            for form in ("tiles", "chunks")
        )
    tiny.assert_close(tiles, chunks, rtol=1e-4, atol=1e-4)


def test_groups_of_heads_share_keys():
    """Grouped-query attention."""
    (q, k, v, _), segments_BT = inputs(), segments()
    k, v = k[:, :, :2], v[:, :, :2]
    found = attend_tiled(q, k, v, segments_BT, None, stage="dense", topk=1, kernels=KERNELS["cpu"])[
        0
    ]
    expected = attend_expanded(
        q, k, v, segments_BT, None, stage="dense", topk=1, query_chunk=512, causal_parts=1
    )[0]
    tiny.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_the_table(monkeypatch):
    def form(asked, platform, length, kind="TPU v5"):
        monkeypatch.setattr("model.attention.table.platform", lambda: platform)
        monkeypatch.setattr(
            "model.attention.table.ambient_device", lambda: types.SimpleNamespace(device_kind=kind)
        )
        return sequence_form(tiny.model_config(attention_form=asked), length).func

    assert (
        form("auto", "tpu", MIN_TILED)
        == form("tiles", "tpu", 8)
        == form("tiles", "cpu", 8)
        == attend_tiled
    )
    assert (
        form("auto", "tpu", MIN_TILED - 1)
        == form("auto", "cpu", 4_096)
        == form("chunks", "tpu", 4_096)
        == attend_expanded
    )
    assert (
        form("auto", "tpu", MIN_TILED, "TPU v6 lite")
        == form("auto", "tpu", MIN_TILED, "TPU7x")
        == attend_tiled
    )
    assert form("auto", "tpu", 4_096, "TPU v4") == attend_expanded, "16 MiB of vector memory"
    with pytest.raises(UserError, match="no kernels for abacus"):
        form("tiles", "abacus", 512)


def test_a_gpu_that_the_kernel_is_not_for(monkeypatch):
    (q, k, v, _), attend = (
        inputs(),
        functools.partial(
            attend_tiled,
            segments_BT=segments(),
            indexer=None,
            stage="dense",
            topk=1,
            kernels=KERNELS["gpu"],
        ),
    )
    with pytest.raises(UserError, match="float32"):
        attend(q, k, v)
    monkeypatch.setattr(
        "model.attention.tiled.ambient_device",
        lambda: types.SimpleNamespace(compute_capability="8.0"),
    )
    with pytest.raises(UserError, match="for Hopper GPUs"):
        attend(q, k, v)
    monkeypatch.undo()
    with pytest.raises(UserError, match="'chunks'"):
        jax.eval_shape(attend, *[jax.ShapeDtypeStruct((B, T, N, 256), jnp.bfloat16)] * 3)


def test_a_gpu_takes_as_many_queries_at_a_time_as_have_room(monkeypatch):
    """Here 40 of the loss's and 53 of the selection's, which divide nothing."""
    assert (
        queries_at_once(64 * 131_072) == 32
        and queries_at_once(16 * 4_096) == 256
        and queries_at_once(2**40) == 1
    )
    monkeypatch.setattr("model.attention.tiled.CHUNK_BYTES", 4 * B * N * T * 40)
    kernels = KERNELS["gpu"]._replace(attend=KERNELS["reference"].attend)
    assert_same(
        result(functools.partial(attend_tiled, stage="sparse", topk=TOPK, kernels=kernels)),
        by_chunks("sparse"),
    )


def test_it_records_what_it_selected():
    tiles, chunks = (
        attend(*inputs()[:3], segments(), inputs()[3], stage="sparse", topk=TOPK, record=True)[2]
        for attend in (
            functools.partial(attend_tiled, kernels=KERNELS["reference"]),
            functools.partial(attend_expanded, query_chunk=512, causal_parts=1),
        )
    )
    assert tiles is not None and chunks is not None
    np.testing.assert_array_equal(tiles, chunks)
