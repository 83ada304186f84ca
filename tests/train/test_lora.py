"""Which matrices have adapters, how these begin, and a step of theirs: on a mesh, by Muon."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from errors import UserError
from model.config import ModelConfig
from model.mesh import MeshConfig
from model.sharding import batch_sharding, is_named, make_mesh
from tests import tiny
from train.base import abstract_run_state
from train.config import TrainConfig
from train.lora import MODULES, Lora, begun_as, lora_of, scale_of
from train.objective import language_objective
from train.optimizer import make_optimizer, path_of
from train.state import StateOverBase, first_state, state_shardings
from train.step import jit_step, make_step


def chosen(*modules: str, config: ModelConfig = tiny.MODEL, **changes) -> set[str]:
    changes = {"stage": "sparse", "lora": 2} | changes
    found = lora_of(config, tiny.train_config(lora_modules=modules, **changes))
    assert found is not None
    return set(found.matrices)


def test_modules_by_name():
    every = chosen(*MODULES)
    assert every == set().union(*(chosen(module) for module in MODULES))
    assert len(every) == sum(len(chosen(module)) for module in MODULES), "none is of two"
    assert chosen("router") == {"layers_1/block_0/moe/router", "mtp_0/block/moe/router"}
    assert chosen("ffn") == {f"layers_0/block_0/ffn/{name}" for name in ("gate", "up", "down")}
    experts = {path for path in every if path.split("/")[-2] == "moe"} - chosen("router")
    assert chosen("experts") == experts and len(experts) == 6
    assert chosen("mtp") == {"mtp_0/merge"}
    # As paths end: a name, or more of it.
    assert chosen("query_up") == {path for path in every if path.endswith("/query_up")}
    assert chosen("moe/down") == {path for path in experts if path.endswith("/down")}
    hybrid = chosen("shared_experts", config=tiny.HYBRID, stage="dense")
    assert "layers_0/block_1/moe/shared_gate" in hybrid
    linear = chosen("attention", config=tiny.HYBRID, stage="dense")
    assert {"layers_0/block_0/attention/decay", "layers_0/block_1/attention/gate"} <= linear
    assert not any(path.endswith(("taps", "rate", "bias", "scale")) for path in linear)


def test_only_what_would_learn_has_an_adapter():
    """As train.trainable: by stage, by the MTP modules' weight, and by its own pattern."""
    every = chosen(*MODULES)
    dense = chosen(*MODULES, stage="dense")
    assert dense == {path for path in every if "/indexer/" not in path}
    assert chosen(*MODULES, stage="warmup") == every - dense
    no_mtp = chosen(*MODULES, mtp_weight=0.0)
    assert no_mtp == {path for path in every if not path.startswith("mtp_")}
    assert chosen(*MODULES, trainable="layers_1.*up$") == {
        path for path in every if path.startswith("layers_1") and path.endswith("up")
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"lora_modules": ("attention", "q_proj")},
            r"the model has no 'q_proj'; there are attention, .*, and matrices down, ",
        ),
        ({"lora_modules": ("indexer",), "stage": "dense"}, "nothing of it learns in this model"),
        ({"lora_modules": ("embedding",)}, "the model has no 'embedding'"),
        ({"lora_modules": ()}, "train.lora_modules = (): names nothing to adapt"),
        ({"lora": -1}, "train.lora = -1: must not be negative"),
        ({"lora_alpha": 0.0}, "train.lora_alpha = 0.0: must be positive"),
        ({"lora_scale": "rsLoRA"}, "train.lora_scale = 'rsLoRA': must be one of rank, sqrt_rank"),
        ({"lora": 0, "lora_from": "peft"}, "train.lora_from = 'peft': begins adapters, and"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(changes, message):
    with pytest.raises(UserError, match=message.replace("= ():", r"= \(\):")):
        lora_of(tiny.MODEL, tiny.train_config(**{"lora": 2} | changes))


def test_without_a_rank_there_are_none():
    assert lora_of(tiny.MODEL, TrainConfig()) is None


def test_scales():
    """alpha / r, and rsLoRA's alpha / sqrt(r)."""
    assert scale_of(16, 32.0, "rank") == 2.0 and scale_of(16, 32.0, "sqrt_rank") == 8.0


def first(lora: Lora, config: ModelConfig, seed: int = 0) -> dict:
    return lora.first(config, jax.random.key(seed))


def test_a_begins_within_its_inputs_and_b_at_nothing():
    """U(-1 / sqrt(inputs), 1 / sqrt(inputs)), whatever axes the inputs are: peft's
    kaiming_uniform_(a=sqrt(5)).
    """
    config = tiny.model_config(num_hidden_layers=8)
    lora = lora_of(config, tiny.train_config(lora=16, lora_modules=("attention",)))
    assert lora is not None
    attention = first(lora, config)["layers_1"]["block_0"]["attention"]
    for name, inputs in (("query_down", 32), ("query_up", 16), ("out", 24)):
        a = np.asarray(attention[name]["a"])
        assert a.ndim == {"out": 4}.get(name, 3) and not np.any(attention[name]["b"])
        assert np.abs(a).max() == pytest.approx(inputs**-0.5, rel=0.02)
        assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
    other = first(lora, config, seed=1)["layers_1"]["block_0"]["attention"]
    assert np.all(attention["out"]["a"] != other["out"]["a"])


def test_adapters_that_are_read_replace_what_is_drawn_where_they_are_known():
    lora = lora_of(tiny.MODEL, tiny.train_config(lora=2, lora_modules=("moe/up", "out")))
    assert lora is not None
    drawn = first(lora, tiny.MODEL)
    path = "layers_1/block_0/moe/up"
    here = drawn["layers_1"]["block_0"]["moe"]["up"]
    known = np.zeros(here["a"].shape[:2] + (2,), bool)
    known[..., 0] = True
    read = {"a": jnp.ones_like(here["a"]), "b": 3 * jnp.ones_like(here["b"])}
    found = begun_as(drawn, {path: read | {"known": jnp.asarray(known)}})
    place = found["layers_1"]["block_0"]["moe"]["up"]
    np.testing.assert_array_equal(place["a"][..., 0], read["a"][..., 0])
    np.testing.assert_array_equal(place["a"][..., 1], here["a"][..., 1])
    np.testing.assert_array_equal(place["b"], read["b"])
    rest = [found["layers_0"], found["mtp_0"], found["layers_1"]["block_0"]["attention"]]
    before = [drawn["layers_0"], drawn["mtp_0"], drawn["layers_1"]["block_0"]["attention"]]
    jax.tree.map(np.testing.assert_array_equal, rest, before)
    assert begun_as(drawn, {}) is drawn


# One MoE layer, whose shared experts are a dense FFN too; the vocabulary divides over the mesh.
CONFIG = tiny.model_config(
    num_hidden_layers=1, first_k_dense_replace=0, vocab_size=64, num_nextn_predict_layers=0
)
TRAIN = tiny.train_config(
    lora=4, stage="dense", lora_modules=("attention", "experts", "shared_experts", "router")
)
LAYOUT = (*tiny.LAYOUT, ((1, 24),), ((0, 24),), ((1, 2), (0, 22)), ((0, 4), (1, 20)))


def step_of(train: TrainConfig, mesh, batch: dict):
    """A step of adapters: the state before and after, and the metrics."""
    lora = lora_of(CONFIG, train)
    assert lora is not None
    boxes = lora.boxes(CONFIG)["params"]
    optimizer = make_optimizer(train, boxes)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda box: (0.1 * rng.normal(size=box.value.shape)).astype(np.float32),
        boxes,
        is_leaf=is_named,
    )
    base = jax.device_get(tiny.variables(CONFIG))
    learnt = jax.device_get(first_state({"params": drawn, "router": base["router"]}, optimizer))
    abstract = abstract_run_state(CONFIG, lora, optimizer, mesh)
    before = jax.tree.map(
        jax.device_put, StateOverBase.of(learnt, base, lora.scale), state_shardings(abstract)
    )
    objective = language_objective(CONFIG, train)
    with jax.set_mesh(mesh):
        step = jit_step(make_step(CONFIG, train, objective, optimizer), abstract, mesh)
        after, metrics = step(before, jax.device_put(batch, batch_sharding(mesh)))
    return before, after, metrics, abstract


def one_device():
    return make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])


@functools.cache
def step_on_one_device():
    return step_of(TRAIN, one_device(), tiny.batch_of(LAYOUT))


@pytest.mark.mesh
def test_a_mesh_computes_what_one_device_does():
    """Moments are compared, of which the first is a tenth of the gradient: see test_sharding. Each
    adapter lies as its matrix does, and a step moves nothing.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, after, metrics, abstract = step_of(TRAIN, mesh, tiny.batch_of(LAYOUT))
    _, expected, expected_metrics, _ = step_on_one_device()
    tiny.assert_close(
        jax.device_get((after.opt_state, after.router, metrics)),
        jax.device_get((expected.opt_state, expected.router, expected_metrics)),
        rtol=1e-4,
        atol=1e-5,
    )
    for leaf, before in zip(jax.tree.leaves(after), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    moe = after.params["layers_0"]["block_0"]["moe"]
    assert moe["up"]["a"].sharding.spec == P(None, "expert", "fsdp", None)
    assert moe["up"]["b"].sharding.spec == P(None, "expert", None, "tensor")
    out = after.params["layers_0"]["block_0"]["attention"]["out"]
    assert out["a"].sharding.spec == P(None, "tensor", None, None)
    assert out["b"].sharding.spec == P(None, None, "fsdp")


@pytest.mark.heavy
def test_a_step_moves_adapters_alone_and_donates_no_base():
    """The router's biases go on as without adapters. The optimizer has moments of adapters only."""
    before, after, metrics, _ = step_on_one_device()
    assert after.base is before.base and not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(before.base)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    moved = jax.tree.map(lambda a: float(jnp.max(jnp.abs(a))), after.params)
    assert all(size > 0 for size in jax.tree.leaves(moved))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(after.params))
    assert 2 * adapters <= sizes <= 2 * adapters + 4, "two moments each, and counters"
    bias = after.router["layers_0"]["block_0"]["moe"]["bias"]
    assert np.any(np.asarray(bias) != before.base["router"]["layers_0"]["block_0"]["moe"]["bias"])
    assert float(metrics["grad_norm"]) > 0


def test_muon_takes_each_factor_for_a_matrix():
    """B's update is orthogonal, r singular values of one size, of each expert; A's is nothing while
    B is 0, and not NaN.
    """
    train = dataclasses.replace(TRAIN, optimizer="muon", clip_norm=0.0, weight_decay=0.0)
    lora = lora_of(CONFIG, train)
    assert lora is not None
    boxes = lora.boxes(CONFIG)["params"]
    params, optimizer = first(lora, CONFIG), make_optimizer(train, boxes)
    rng = np.random.default_rng(0)

    def gradient(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(drawn * (path[-1].key == "b"))

    gradients = jax.tree_util.tree_map_with_path(gradient, params)
    updates, _ = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params))(gradients)
    for path, leaf in jax.tree.leaves_with_path(updates):
        if path[-1].key == "a":
            assert not np.any(leaf), path_of(path)
    up_LErF = updates["layers_0"]["block_0"]["moe"]["up"]["b"]
    values = np.linalg.svd(np.asarray(up_LErF[0]), compute_uv=False)
    # Newton-Schulz brings singular values to 0.7 .. 1.2 of one size.
    assert values.shape == (4, 4) and np.all(values.max() / values < 2)
