"""Runs that learn by adapters: stopped and resumed, small on disk, and whole to who reads them."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import pytest

from experiment import setup
from experiment.schema import Config
from launch import finetune, pretrain, reinforce
from model.sharding import make_mesh
from tests.launch.test_training_commands import (
    CHAT,
    NO_MTP,
    final_variables,
    losses,
    stopped_at,
    tiny,
)

pytestmark = pytest.mark.command

LORA = {"train__lora": 2, "train__learning_rate": 1e-2, "train__stage": "dense"}
RL = {"sampling__attention": "dense", "reinforce__rewards": {"own.py:length": 1.0}}
KL = {"reinforce__algorithm": "grpo", "reinforce__kl_weight": 0.5}
# Random bytes are never a right answer: a reward that some completions earn and some do not.
REWARD = """
def length(text, problem):
    return len(text.encode()) % 3 / 2
"""


@pytest.fixture(autouse=True)
def in_a_place_with_a_reward(tmp_path, monkeypatch):
    """And one device, which compiles in half the time of eight."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(REWARD)
    devices = jax.devices()[:1]
    monkeypatch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, devices))


def config_of(init_from: str = "", **changes: Any) -> Config:
    return dataclasses.replace(tiny(**NO_MTP | LORA | changes), init_from=init_from)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run of all parameters, which others begin from."""
    workdir = tmp_path_factory.mktemp("start")
    changes = {"train__stage": "dense", "train__steps": 1, "train__eval_batches": 0}
    assert pretrain.run(tiny(**NO_MTP | changes), workdir)
    return workdir


@pytest.mark.parametrize("kind", ["finetune", "reinforce"])
def test_stopped_and_resumed_is_bit_identical_though_the_source_goes_on(kind, start, monkeypatch):
    shutil.copytree(start, "start")
    run, changes = {"finetune": (finetune.run, CHAT), "reinforce": (reinforce.run, RL | KL)}[kind]
    config = config_of("start", **changes)
    assert run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not run(config, Path("parts"))
    longer = tiny(**NO_MTP, train__stage="dense", train__steps=2, train__eval_batches=0)
    assert pretrain.run(longer, Path("start"))
    assert run(config, Path("parts"))
    assert losses(Path("parts")) == losses(Path("whole"))
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
