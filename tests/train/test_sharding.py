"""Eight pretended devices compute what one computes, whatever the mesh: float32 sums in another
order.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.mesh import MeshConfig
from model.sharding import batch_sharding, make_mesh
from model.transformer import boxed_shapes
from rl.algorithms.spec import get_algorithm
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.objective import policy_objective
from rl.request import Prompt, keys_of
from tests import tiny
from train.objective import language_objective
from train.optimizer import make_optimizer, path_of
from train.state import (
    TrainState,
    abstract_state,
    first_state,
    fresh_state,
    make_state,
    state_shardings,
)
from train.step import abstract_batch, jit_step, make_step

pytestmark = pytest.mark.mesh

ONE = MeshConfig(data=1, fsdp=1, expert=1, tensor=1)
MESHES = {
    "data 8": MeshConfig(data=8, fsdp=1, expert=1, tensor=1),
    "fsdp 8": MeshConfig(data=1, fsdp=8, expert=1, tensor=1),
    "data 2, fsdp 2, expert 2": MeshConfig(data=2, fsdp=2, expert=2, tensor=1),
    "expert 4, tensor 2": MeshConfig(data=1, fsdp=1, expert=4, tensor=2),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, fsdp=1, expert=2, tensor=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
# The vocabulary divides over the tensor axis. One MoE layer, whose shared experts are a dense FFN
# too; MTP where the objective has it.
CONFIGS = {
    "language": tiny.model_config(num_hidden_layers=1, first_k_dense_replace=0, vocab_size=64),
    "reinforce": tiny.model_config(
        num_hidden_layers=1, first_k_dense_replace=0, vocab_size=64, num_nextn_predict_layers=0
    ),
}
LAYOUT = (*tiny.LAYOUT, ((1, 24),), ((0, 24),), ((1, 2), (0, 22)), ((0, 4), (1, 20)))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TRAIN = tiny.train_config(weight_decay=0.0)


@functools.cache
def optimizer():
    # The other config has some of these parameters.
    return make_optimizer(TRAIN, boxed_shapes(CONFIGS["language"])["params"])


def mesh_of(name: str):
    return make_mesh(ONE, jax.devices()[:1]) if name == "one" else make_mesh(MESHES[name])


def placed_state(config, mesh) -> TrainState:
    """The tests' own parameters, in the places a trainer would give them."""
    where = state_shardings(abstract_state(config, optimizer(), mesh))
    state = jax.device_get(first_state(tiny.variables(config), optimizer()))
    return jax.tree.map(jax.device_put, state, where)


def objective_and_batch(config, kind: str):
    batch = tiny.batch_of(LAYOUT)
    if kind == "language":
        return language_objective(config, TRAIN), batch
    rng = np.random.default_rng(0)
    mask_BT = (batch["segments"] > 0) & (jnp.arange(tiny.T) >= 8)
    old, reference = (
        jnp.where(mask_BT, jnp.asarray(-4 + 0.1 * rng.normal(size=mask_BT.shape), jnp.float32), 0.0)
        for _ in range(2)
    )
    advantages = jnp.where(mask_BT, jnp.asarray(rng.normal(size=(8, 1)), jnp.float32), 0.0)
    batch |= {
        "mask": mask_BT,
        "sampler_logprobs": old,
        "old_logprobs": old,
        "reference_logprobs": reference,
        "advantages": advantages,
    }
    return policy_objective(config, TRAIN, get_algorithm(kind, max_completion=16), 1.0), batch


@functools.cache
def step_on(name: str, kind: str):
    """The state after a step, and what of it must be the same on every mesh: Adam's moments, the
    router and the metrics. The first moment is a tenth of the clipped gradient. Parameters are not
    compared: Adam's first step is the gradient's sign, which makes two learning rates of a rounding
    near 0.
    """
    config = CONFIGS["language" if kind == "language" else "reinforce"]
    mesh, (objective, batch) = mesh_of(name), objective_and_batch(config, kind)
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(config, TRAIN, objective, optimizer()))
        state, metrics = step(
            placed_state(config, mesh), jax.device_put(batch, batch_sharding(mesh))
        )
    return state, jax.device_get((state.opt_state, state.router, metrics))


# Meshes of which the others have all.
COVERED = ("data 8", "data 2, expert 2, tensor 2")
CASES = [
    *(
        pytest.param(name, "language", marks=[pytest.mark.slow] if name in COVERED else [])
        for name in MESHES
    ),
    ("data 2, fsdp 2, expert 2", "grpo"),
    ("data 2, expert 2, tensor 2", "dr_grpo"),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_mesh_computes_what_one_device_does(name, kind):
    state, found = step_on(name, kind)
    tiny.assert_close(found, step_on("one", kind)[1], **TOLERANCE)
    where = abstract_state(
        CONFIGS["language" if kind == "language" else "reinforce"], optimizer(), mesh_of(name)
    )
    for leaf, before in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim), "a step moved it"


@pytest.fixture
def no_cache():
    """A program that is found in the cache is not compiled, and nothing is said of it."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize(
    "name",
    [  # those with the most axes; the others take their time in `make test-all`
        pytest.param(name, marks=[] if sum(size > 1 for size in sizes) == 3 else [pytest.mark.slow])
        for name, sizes in ((name, dataclasses.astuple(mesh)) for name, mesh in MESHES.items())
    ],
)
def test_no_array_is_made_whole_on_every_device_to_be_cut_anew(name, no_cache, capfd):
    """XLA warns of it: "Involuntary full rematerialization"."""
    config, mesh = CONFIGS["language"], mesh_of(name)
    with jax.set_mesh(mesh):
        step = make_step(config, TRAIN, language_objective(config, TRAIN), optimizer())
        batch = abstract_batch(len(LAYOUT), tiny.T, mesh)
        state = abstract_state(config, optimizer(), mesh)
        jit_step(step, state, mesh).lower(state, batch).compile()
    assert "ematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("name", MESHES)
def test_moments_lie_where_their_parameters_do(name):
    abstract = abstract_state(CONFIGS["language"], optimizer(), mesh_of(name))
    of_parameter = {
        tuple(key.key for key in path): leaf.sharding
        for path, leaf in jax.tree.leaves_with_path(abstract.params)
    }
    adam = cast(Any, abstract.opt_state).inner_states[True].inner_state[1][0]
    for moments in (adam.mu, adam.nu):
        found = {
            tuple(key.key for key in path): leaf.sharding
            for path, leaf in jax.tree.leaves_with_path(moments)
        }
        assert found == of_parameter
    split = {
        leaf.sharding.spec
        for leaf in jax.tree.leaves(abstract.params)
        if not leaf.sharding.is_fully_replicated
    }
    assert bool(split) == (name != "data 8")


def test_muon_moments_lie_where_their_parameters_do():
    """Muon has a momentum for each matrix and AdamW's two moments for the rest, in trees of their
    own.
    """
    parameters = boxed_shapes(CONFIGS["language"])["params"]
    muon = make_optimizer(tiny.train_config(optimizer="muon"), parameters)
    abstract = abstract_state(CONFIGS["language"], muon, mesh_of("data 2, fsdp 2, expert 2"))
    of_parameter = {
        tuple(key.key for key in path): leaf.sharding
        for path, leaf in jax.tree.leaves_with_path(abstract.params)
    }
    found = [
        (path_of(path), leaf.sharding)
        for path, leaf in jax.tree.leaves_with_path(abstract.opt_state)
        if leaf.ndim
    ]
    for parameter, sharding in of_parameter.items():
        name = "/".join(parameter)
        moments = [its for path, its in found if path.endswith("/" + name)]
        assert moments == [sharding] * (
            2 if parameter[-1] in ("scale", "bias", "taps", "embedding", "head") else 1
        ), name


def test_a_fresh_state_is_the_same_on_any_mesh():
    mesh = mesh_of("data 2, fsdp 2, expert 2")
    config = CONFIGS["reinforce"]
    expected = jax.jit(lambda key: make_state(config, optimizer(), key))(jax.random.key(0))
    tiny.assert_close(
        jax.device_get(fresh_state(config, optimizer(), mesh, jax.random.key(0))),
        jax.device_get(expected),
        rtol=1e-6,
    )


SAMPLING = SamplingConfig(
    temperature=0.8, top_p=0.95, max_prompt_tokens=16, max_new_tokens=6, attention="sparse"
)


@functools.cache
def sampled_on(name: str, model: str = "reinforce", drafts: int = 0) -> dict:
    """What an engine of 16 slots samples: two completions each of ten prompts."""
    mesh, config = mesh_of(name), CONFIGS[model]
    lengths, rng = (16, 13, 7, 1, 15, 14, 8, 4, 2, 11), np.random.default_rng(0)
    prompts = [
        Prompt(rng.integers(8, 64, length).tolist(), keys_G2, 6, (5, 6, 7), group=number)
        for number, (length, keys_G2) in enumerate(
            zip(lengths, keys_of(jax.random.key(3), range(len(lengths)), 2), strict=True)
        )
    ]
    sampling = dataclasses.replace(SAMPLING, drafts=drafts)
    engine = Engine(config, mesh, sampling, rows=16, group_size=2)
    with jax.set_mesh(mesh):
        variables = placed_state(config, mesh).variables
    with engine.loaded(variables):
        return {(each.group, each.sample): vars(each) for each in engine.run(prompts)}


@pytest.mark.parametrize("name", ["data 8", "data 2, fsdp 2, expert 2", "expert 4, tensor 2"])
def test_a_mesh_samples_what_one_device_does(name):
    """The same tokens, to the bit, and the same record of them: a program for a mesh is another
    program, which fuses other operations, and its float32 sums may differ in their last bits.
    """
    assert_same_samples(sampled_on(name), sampled_on("one"))


def test_a_mesh_takes_the_drafts_that_leave_samples_as_they_are():
    """Of one MTP module, with and without."""
    found = sampled_on("data 2, fsdp 2, expert 2", "language", drafts=1)
    assert_same_samples(found, sampled_on("one", "language"))


def assert_same_samples(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for number, trajectory in expected.items():
        for field, value in trajectory.items():
            if field not in ("logprobs_T", "log_kept_T"):
                np.testing.assert_array_equal(found[number][field], value, err_msg=field)
            else:
                tiny.assert_close(found[number][field], value, **TOLERANCE)
