"""The base of adapters: kept once, read back to the bit, found by who reads the run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoints.convert import source_of_policy
from checkpoints.hf.tensors import tensors
from checkpoints.lora import open_run, recorded_lora
from checkpoints.streamed import StreamedReader
from checkpoints.training import Checkpoints
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from model.adapters import merged
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny
from train.optimizer import make_optimizer, path_of
from train.restore import Branch, load_variables, restored_or_new
from train.setup import Setup
from train.state import StateOverBase, first_state

CONFIG = tiny.model_config(num_nextn_predict_layers=0)
LORA = tiny.train_config(lora=2, lora_modules=("attention", "experts", "router"))


@pytest.fixture(autouse=True)
def in_an_empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def setup_of(devices: int = 1, **mesh: int) -> Setup:
    axes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | mesh
    made = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    return Setup(CONFIG, bytes_tokenizer(), made)


def source(value: float, step: int = 3) -> str:
    """A run of all parameters, each `value` times those of the tests."""
    variables = jax.tree.map(lambda x: value * x, tiny.variables(CONFIG))
    with Checkpoints(Path("source/checkpoints"), keep=1) as checkpoints:
        checkpoints.save(step, first_state(variables, optax.identity()))
    return "source"


def state_of(workdir: str, init_from: str = "", **changes: Any) -> StateOverBase:
    """The state that a run in `workdir` begins with or goes on from."""
    train = dataclasses.replace(LORA, **changes.pop("train", {}))
    setup = setup_of().learning(train)
    assert setup.lora is not None
    optimizer = make_optimizer(train, setup.lora.boxes(CONFIG)["params"])
    with Checkpoints(Path(workdir) / "checkpoints", keep=2) as checkpoints:
        state = restored_or_new(
            setup, optimizer, checkpoints, init_from=init_from, seed=0, **changes
        )
    assert isinstance(state, StateOverBase)
    return state


def learnt(state: StateOverBase, step: int = 5) -> StateOverBase:
    """The state with random adapters, and router biases that have moved."""
    rng = np.random.default_rng(step)
    moved = dataclasses.replace(
        state.learnt,
        step=jnp.asarray(step),
        params=jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape) + x, state.params),
        router=jax.tree.map(lambda x: x + 1, state.router),
    )
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state.learnt)
    return state.with_learnt(moved)


def save(workdir: str, state: StateOverBase) -> None:
    with Checkpoints(Path(workdir) / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(int(state.step), state.learnt)


def same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_a_run_keeps_its_base_and_where_it_comes_from():
    before = tiny.variables(CONFIG)
    state = state_of("run", source(1.0))
    same(state.base, before)
    record = json.loads(Path("run/lora.json").read_text())
    assert (record["rank"], record["scale"]) == (2, 16.0)
    assert (record["source"], record["step"]) == ("source/checkpoints/3", 3)
    save("run", learnt(state))
    shutil.rmtree("source")
    source(2.0, step=9)
    same(state_of("run", "source").base, before)
    same(state_of("run", "source").learnt, learnt(state).learnt)


def test_a_run_killed_before_its_first_checkpoint_has_the_same_base_again():
    """A base that is not recorded yet, or half written, is made anew."""
    first = state_of("run", source(1.0))
    shutil.rmtree("source")
    same(state_of("run", source(2.0, step=4)).base, first.base)
    Path("run/lora.json").unlink()
    same(state_of("run", "source").base, jax.tree.map(lambda x: 2 * x, first.base))
    assert json.loads(Path("run/lora.json").read_text())["step"] == 4


def test_a_base_that_is_gone_is_one_line():
    save("run", learnt(state_of("run")))
    shutil.move("run/base", "elsewhere")
    message = "run/base: the parameters are gone that the adapters of this run are added to"
    with pytest.raises(UserError, match=message):
        state_of("run")
    with pytest.raises(UserError, match="no checkpoint there"):
        load_variables(CONFIG, setup_of().mesh, "run")
    Path("run/lora.json").write_text('{"rank": 2}')
    with pytest.raises(UserError, match=r"lora.json: not the record of a run's adapters"):
        load_variables(CONFIG, setup_of().mesh, "run")


def test_checkpoints_have_adapters_and_no_base():
    state = learnt(state_of("run"))
    save("run", state)
    own = {name for name in StreamedReader(Path("run")).leaves if name.startswith("params/")}
    record = recorded_lora("run")
    assert record is not None
    assert own == {f"params/{path}/{factor}" for path in record.matrices for factor in "ab"}


def test_variables_are_exported_as_the_sum(tmp_path):
    """As a server of another process gets them in the middle of a run; and a state has the same
    arrays whenever it is asked, by which such a server knows what it has.
    """
    state = learnt(state_of("run"))
    assert all(
        one is other
        for one, other in zip(
            jax.tree.leaves(state.variables), jax.tree.leaves(state.variables), strict=True
        )
    )
    plain = merged(state.variables)
    sources = [
        source_of_policy(variables, tmp_path, CONFIG, bytes_tokenizer(), "", 8, "here")
        for variables in (state.variables, plain, state.base)
    ]
    moved = 0
    for tensor in tensors(CONFIG):
        found, expected, before = (one.rows(tensor, 0, tensor.shape[0]) for one in sources)
        np.testing.assert_array_equal(found, expected)
        moved += bool(np.any(found != before))
    assert moved > 20


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/5"])
def test_who_reads_a_run_sees_base_and_adapters_added_up(place):
    """On one device or eight, and slice by slice, as export does."""
    state = learnt(state_of("run", source(1.0)))
    save("run", state)
    if place == "run/checkpoints/5":
        save("run", learnt(state, step=6))
    found = load_variables(CONFIG, setup_of().mesh, place)
    if place == "run":
        mesh = setup_of(8, fsdp=2, expert=2, tensor=1, data=2).mesh
        # Sums over the rank, in another order at most.
        tiny.assert_close(jax.device_get(load_variables(CONFIG, mesh, place)), found, atol=1e-6)
    same(found["router"], state.router)
    factors = {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(state.params)}
    base = jax.tree.leaves_with_path(state.base["params"])
    reader, adapted = open_run(Path(place)), 0
    for (path, before), after in zip(base, jax.tree.leaves(found["params"]), strict=True):
        name = path_of(path)
        if f"{name}/a" in factors:
            added = dense_product(before, factors[f"{name}/a"], factors[f"{name}/b"])
            np.testing.assert_allclose(after - before, 16.0 * added, atol=1e-5, err_msg=name)
            adapted += 1
        else:
            np.testing.assert_array_equal(after, before)
        index = tuple(slice(size // 2, size) for size in before.shape)
        np.testing.assert_allclose(
            reader.read(f"params/{name}", index), after[index], atol=1e-5, err_msg=name
        )
    assert adapted == len(factors) // 2
    bias = reader.read("router/layers_1/block_0/moe/bias")
    np.testing.assert_array_equal(bias, state.router["layers_1"]["block_0"]["moe"]["bias"])


def dense_product(matrix, a, b) -> np.ndarray:
    """A B in float64, one stacked matrix after the other."""
    inputs = matrix.ndim - b.ndim + 1
    stacked = a.ndim - 1 - inputs
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    left = a.reshape(int(np.prod(a.shape[:stacked])), -1, a.shape[-1])
    right = b.reshape(len(left), a.shape[-1], -1)
    return (left @ right).reshape(matrix.shape)


def test_a_run_begins_from_the_sum_of_another():
    save("first", learnt(state_of("first", source(1.0))))
    second = state_of("second", "first")
    same(second.base, load_variables(CONFIG, setup_of().mesh, "first"))
    assert not any(
        np.any(leaf)
        for path, leaf in jax.tree.leaves_with_path(second.params)
        if path[-1].key == "b"
    )


def test_a_branch_takes_adapters_base_and_optimizer():
    state = learnt(state_of("first", source(1.0)))
    save("first", state)
    branch = Branch(steps=9, same_data=False)
    second = state_of("second", "first", branch=branch)
    same(second, state)
    record = json.loads(Path("second/lora.json").read_text())
    assert record["source"] == "source/checkpoints/3"
    with pytest.raises(UserError, match="first has no adapters of this rank, scale and matrices"):
        state_of("third", "first", branch=branch, train={"lora": 3})
    with pytest.raises(UserError, match="source has no adapters"):
        state_of("third", "source", branch=branch)
    with (
        Checkpoints(Path("fourth/checkpoints"), keep=1) as checkpoints,
        pytest.raises(UserError, match=r"first learnt by adapters; give train\.lora as it has"),
    ):
        restored_or_new(
            setup_of(), optax.identity(), checkpoints, init_from="first", seed=0, branch=branch
        )
