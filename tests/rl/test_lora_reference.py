"""Of a policy that learns by adapters the reference is the base, without a copy."""

import dataclasses
from pathlib import Path

import pytest

from checkpoints.training import Checkpoints
from errors import UserError
from rl.config import ReinforceConfig
from rl.critic import Critic
from rl.reference import begun
from tests.train.test_base import CONFIG, LORA, learnt, same, setup_of, source
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
    options = {"needs_reference": True, "references": 1, "init_from": source(1.0), "seed": 0}
    kept = ReinforceConfig(algorithm="grpo", kl_weight=0.1)
    for reinforce in (kept, dataclasses.replace(kept, reference_every=2)):
        workdir = Path(f"run{reinforce.reference_every}")
        with (
            Checkpoints(workdir / "checkpoints", keep=1) as checkpoints,
            begun(setup, optimizer, checkpoints, workdir, None, None, reinforce, **options) as (
                state,
                reference,
            ),
        ):
            assert isinstance(state, StateOverBase) and reference is not None
            assert reference.variables is state.base
            moved = learnt(state, step=2)
            reference.after(2, moved.variables)
            if reinforce.reference_every:
                checkpoints.save(2, moved.learnt)
                expected = reference.variables
                assert reference.variables is not state.base
            else:
                assert reference.variables is state.base
        assert not Path("run0/reference").exists()
    with (
        Checkpoints(Path("run2/checkpoints"), keep=1) as checkpoints,
        begun(setup, optimizer, checkpoints, Path("run2"), None, None, reinforce, **options) as (
            state,
            reference,
        ),
    ):
        assert reference is not None
        same(state.learnt, moved.learnt)
        same(reference.variables, expected)
        same(load_variables(CONFIG, setup.mesh, "run2"), expected)


def test_a_critic_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"train.lora = 2: .*= 'ppo' has a critic"):
        Critic(setup_of(), LORA, ReinforceConfig(algorithm="ppo"))
