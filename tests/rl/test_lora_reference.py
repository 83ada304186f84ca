"""Of a policy that learns by adapters the reference is the base, without a copy."""

import dataclasses
from pathlib import Path

import jax
import pytest

from checkpoints.training import Checkpoints
from errors import UserError
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.config import ReinforceConfig
from rl.critic import Critic
from rl.reference import begun
from rl.weights import Weights
from tests.train.test_base import CONFIG, LORA, learnt, same, setup_of, source, state_of
from train.optimizer import make_optimizer
from train.restore import load_variables
from train.state import StateOverBase


@pytest.fixture(autouse=True)
def in_an_empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_reference_is_the_base_itself():
    """No second copy, in memory or on the disk; a state goes on, and it stays."""
    setup = setup_of().learning(LORA)
    assert setup.lora is not None
    optimizer = make_optimizer(LORA, setup.lora.boxes(CONFIG)["params"])
    start = source(1.0)

    def beginning(reinforce, workdir, checkpoints):
        given = checkpoints, workdir, None, None, LORA, reinforce
        return begun(setup, optimizer, *given, needs_reference=True, init_from=start, seed=0)

    kept = ReinforceConfig(algorithm="grpo", kl_weight=0.1)
    moving = dataclasses.replace(kept, reference_every=2)
    for reinforce, workdir in ((kept, Path("kept")), (moving, Path("moving"))):
        with (
            Checkpoints(workdir / "checkpoints", keep=1) as checkpoints,
            beginning(reinforce, workdir, checkpoints) as (state, reference),
        ):
            assert isinstance(state, StateOverBase) and reference is not None
            assert reference.variables is state.base
            moved = learnt(state, step=2)
            reference.after(2, moved.variables)
            checkpoints.save(2, moved.learnt)
            assert (reference.variables is state.base) == (reinforce is kept)
            expected = reference.variables
    assert not Path("kept/reference").exists()
    with (
        Checkpoints(Path("moving/checkpoints"), keep=1) as checkpoints,
        beginning(moving, Path("moving"), checkpoints) as (state, reference),
    ):
        assert reference is not None
        same(state.learnt, moved.learnt)
        same(reference.variables, expected)
        same(load_variables(CONFIG, setup.mesh, "moving"), expected)


def test_a_critic_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"train.lora = 2: .*= 'ppo' has a critic"):
        Critic(setup_of(), LORA, ReinforceConfig(algorithm="ppo"))


def test_a_sampler_of_its_own_devices_gets_the_base_once():
    lora, state = setup_of().learning(LORA).lora, state_of("run")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[1:2])
    weights = Weights(CONFIG, mesh, checked=True, lora=lora)
    first = weights.sent(state.variables, 1)()
    second = weights.sent(learnt(state).variables, 2)()
    same(first, state.variables)
    same(second, learnt(state).variables)
    assert second["params"] is first["params"] and second["lora"] is not first["lora"]
    assert {leaf.device for leaf in jax.tree.leaves(second)} == {jax.devices()[1]}
