"""Adapters as the model reads them: W + A B, layer by layer, and never a second model in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.adapters import COLLECTION, adapter_boxes, merged, product
from model.config import ModelConfig
from model.sharding import Named, ParameterUse, is_named
from model.transformer import boxed_shapes
from tests import tiny
from train.config import TrainConfig
from train.lora import MODULES, Lora, lora_of
from train.objective import language_objective
from train.optimizer import path_of
from train.state import StateOverBase, first_state
from train.step import loss_and_gradient

EVERY = tuple(MODULES)
# MLA with an indexer and an MTP module; linear and grouped attention, with a gated shared expert.
LANGUAGE = tiny.model_config(num_hidden_layers=2, first_k_dense_replace=0)
HYBRID = dataclasses.replace(tiny.HYBRID, num_hidden_layers=2, num_nextn_predict_layers=0)
CONFIGS = {"language": (LANGUAGE, "sparse", 1), "hybrid": (HYBRID, "dense", 2)}


def train_of(stage: str, **changes) -> TrainConfig:
    return tiny.train_config(stage=stage, lora=3, lora_modules=EVERY, **changes)


@functools.cache
def lora(config: ModelConfig, stage: str) -> Lora:
    found = lora_of(config, train_of(stage))
    assert found is not None
    return found


def adapters(config: ModelConfig, stage: str, zero_b: bool = False) -> dict:
    """Random factors, as wide as makes the logits move; or with B at 0, as a run begins."""
    rng = np.random.default_rng(0)

    def draw(path, box):
        values = 0.1 * rng.normal(size=box.value.shape).astype(np.float32)
        return jnp.asarray(0 * values if zero_b and path[-1].key == "b" else values)

    boxes = lora(config, stage).boxes(config)["params"]
    return jax.tree_util.tree_map_with_path(draw, boxes, is_leaf=is_named)


def state(config: ModelConfig, stage: str, **kind) -> StateOverBase:
    base = tiny.variables(config)
    variables = {"params": adapters(config, stage, **kind), "router": base["router"]}
    learnt = first_state(variables, optax.identity())
    return StateOverBase.of(learnt, base, lora(config, stage).scale)


def by_path(tree) -> dict:
    return {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_named)}


def as_matrices(x: np.ndarray, stacked: int, inputs: int) -> np.ndarray:
    """[stacked, rows, columns] of an array [*stacked, *inputs, *outputs]."""
    rows = int(np.prod(x.shape[stacked : stacked + inputs], dtype=int))
    return np.asarray(x, np.float64).reshape(-1, rows, int(np.prod(x.shape[stacked + inputs :])))


@pytest.mark.heavy
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_a_dense_matrix_by_the_chain_rule(name):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, at W = W_0 + s A B, of every kind of matrix:
    heads as inputs or outputs, experts, a router, an indexer, the merge of an MTP module; in one
    microbatch, or two. float32 sums in another order.
    """
    config, stage, microbatches = CONFIGS[name]
    own, batch = state(config, stage), tiny.batch_of()
    objective = language_objective(config, train_of(stage))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(state, microbatches):
        mask = jax.tree.map(lambda _: True, state.params)
        return loss_and_gradient(objective, mask, state, batch, microbatches)[0]

    dense = by_path(gradient(first_state(merged(own.variables), optax.identity()), 1))
    boxes, factors = by_path(boxed_shapes(config)["params"]), by_path(own.params)
    found = by_path(gradient(own, microbatches))
    kinds = set()
    for path in lora(config, stage).matrices:
        inputs, outputs = boxes[path].matrix_axes
        stacked = inputs[0]
        kinds.add((stacked, len(inputs), len(outputs)))
        dense_SIO = as_matrices(dense[path], stacked, len(inputs))
        a_SIr = as_matrices(factors[f"{path}/a"], stacked, len(inputs))
        b_SrO = as_matrices(factors[f"{path}/b"], stacked, 1)
        expected = {
            "a": own.scale * dense_SIO @ b_SrO.swapaxes(1, 2),
            "b": own.scale * a_SIr.swapaxes(1, 2) @ dense_SIO,
        }
        for factor, gradient_SXX in expected.items():
            most = np.abs(gradient_SXX).max()
            assert most > 0, f"{path}: the loss does not depend on it"
            its = np.asarray(found[f"{path}/{factor}"]).reshape(gradient_SXX.shape)
            np.testing.assert_allclose(
                its, gradient_SXX, rtol=0, atol=2e-4 * most, err_msg=f"{path}/{factor}"
            )
    assert {(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)} <= kinds


@pytest.mark.heavy
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_begins_as_its_base_and_adding_up_changes_nothing(name):
    """To the bit in the parameters; in the logits to float32 sums in another order, since a program
    that adds adapters is another one.
    """
    config, stage, _ = CONFIGS[name]
    base, first = tiny.variables(config), state(config, stage, zero_b=True).variables
    jax.tree.map(np.testing.assert_array_equal, merged(first), base)
    own, batch = state(config, stage).variables, tiny.batch_of()
    logits = [
        tiny.forward(config, variables, batch, stage)["logits_BTV"]
        for variables in (base, first, own, merged(own))
    ]
    tiny.assert_close(logits[1], logits[0], atol=1e-4)
    tiny.assert_close(logits[3], logits[2], atol=1e-4)
    assert tiny.tree_max(logits[2] - logits[0]) > 0.5


def outputs_of(jaxpr) -> list[tuple[int, ...]]:
    """The shapes of all that the equations of a program make, those of inner programs left out."""
    return [tuple(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars]


@pytest.mark.heavy
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_no_matrix_of_all_layers_is_made_for_the_gradient(remat):
    """Neither the sum of base and adapters nor its gradient is ever there for more than a layer:
    the scan over layers gives back nothing of such a shape. A dense gradient does.
    """
    config = tiny.model_config(
        num_hidden_layers=5, first_k_dense_replace=0, num_nextn_predict_layers=0, remat=remat
    )
    train, batch = train_of("dense"), tiny.batch_of()
    own = lora_of(config, train)
    assert own is not None
    boxes = own.boxes(config)
    objective = language_objective(config, train)
    base, learnt = (
        jax.tree.map(lambda box: box.value, tree, is_leaf=is_named)
        for tree in (boxed_shapes(config), boxes)
    )
    shapes = by_path(base["params"])
    whole = {shapes[path].shape for path in own.matrices}
    assert all(shape[0] == 5 for shape in whole)

    def gradient(params, base):
        state = StateOverBase.of(
            first_state({"params": params, "router": base["router"]}, optax.identity()), base, 2.0
        )
        mask = jax.tree.map(lambda _: True, params)
        return loss_and_gradient(objective, mask, state, batch, 1)[0]

    def dense(params, router):
        state = first_state({"params": params, "router": router}, optax.identity())
        mask = jax.tree.map(lambda _: True, params)
        return loss_and_gradient(objective, mask, state, batch, 1)[0]

    made = outputs_of(jax.make_jaxpr(gradient)(learnt["params"], base))
    assert not whole & set(made)
    assert whole <= set(outputs_of(jax.make_jaxpr(dense)(base["params"], base["router"])))


@pytest.mark.parametrize(
    "names, inputs, shape",
    [
        (("embed", "ffn"), 1, (6, 5)),
        (("heads", "head_dim", "embed"), 2, (2, 3, 5)),
        (("layers", "embed", "heads", "head_dim"), 1, (4, 6, 2, 3)),
        (("layers", "experts", "ffn", "embed"), 1, (4, 3, 6, 5)),
    ],
)
def test_a_product_is_of_the_shape_of_its_matrix_and_lies_as_it_does(names, inputs, shape):
    box = Named(
        jax.ShapeDtypeStruct(shape, jnp.float32), names, use=ParameterUse(input_axes=inputs)
    )
    boxes = adapter_boxes(box, 2)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=boxes[name].value.shape).astype(np.float32) for name in ("a", "b"))
    found = product(jnp.asarray(a), jnp.asarray(b), len(shape))
    stacked = sum(name in ("layers", "experts") for name in names)
    expected = as_matrices(a, stacked, inputs) @ as_matrices(b, stacked, 1)
    np.testing.assert_allclose(found, expected.reshape(shape), rtol=1e-5, atol=1e-6)
    split = stacked + inputs
    assert boxes["a"].names == (*names[:split], "lora_rank")
    assert boxes["b"].names == (*names[:stacked], "lora_rank", *names[split:])
    # Muon takes each factor for a matrix.
    assert boxes["a"].matrix_axes == (tuple(range(stacked, split)), (split,))
    outputs = tuple(range(stacked + 1, stacked + 1 + len(names) - split))
    assert boxes["b"].matrix_axes == ((stacked,), outputs)


def test_what_has_no_adapter_is_left_as_it_is():
    own = state(*CONFIGS["language"][:2]).variables
    plain = merged(own)
    assert COLLECTION not in plain
    assert plain["params"]["embedding"] is own["params"]["embedding"]
    assert merged(plain)["params"] == plain["params"]
