"""Runs that learn by adapters: stopped and resumed, small on disk, and whole to who reads them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from errors import UserError
from experiment import setup
from experiment.schema import Config
from launch import convert, finetune, pretrain, reinforce
from model.sharding import make_mesh
from tests.launch.test_bring_a_checkpoint import chats, configured
from tests.launch.test_training_commands import (
    CHAT,
    NO_MTP,
    final_variables,
    losses,
    stopped_at,
    tiny,
)
from tests.tiny_checkpoint import write_checkpoint, write_tokenizer
from train.restore import load_variables

pytestmark = pytest.mark.command

LORA = {"train__lora": 2, "train__learning_rate": 1e-2, "train__stage": "dense"}
RL = {
    "sampling__attention": "dense",
    "reinforce__rewards": {"own.py:length": 1.0},
    "reinforce__algorithm": "grpo",
    "reinforce__kl_weight": 0.5,
    "reinforce__minibatches": 2,
    "reinforce__epochs": 2,
    "train__microbatches": 2,
}
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
    monkeypatch.setattr(setup, "make_mesh", lambda mesh, _: make_mesh(mesh, devices))


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
    run, changes = {"finetune": (finetune.run, CHAT), "reinforce": (reinforce.run, RL)}[kind]
    config = config_of("start", **changes)
    assert run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not run(config, Path("parts"))
    longer = tiny(**NO_MTP, train__stage="dense", train__steps=2, train__eval_batches=0)
    assert pretrain.run(longer, Path("start"))
    assert run(config, Path("parts"))
    parts, whole = (
        [(step, loss) for step, loss in losses(Path(name)) if loss is not None]
        for name in ("parts", "whole")
    )
    assert parts == whole and len(whole) == 4
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    record = json.loads(Path("whole/lora.json").read_text())
    assert record["source"] == "start/checkpoints/1" and not Path("whole/reference").exists()
    if kind == "reinforce":
        lines = map(json.loads, Path("whole/metrics.jsonl").read_text().splitlines())
        kl = [line["kl"] for line in lines if "kl" in line]
        assert kl[-1] > kl[0] > 0, f"the policy leaves its base: {kl}"


def test_a_checkpoint_is_tuned_exported_and_its_adapters_taken_up_again():
    """From hf:DIR by adapters; merged to hf:DIR they are what the run reads as, and from peft:DIR
    another run begins as this one ended.
    """
    write_tokenizer(write_checkpoint(Path("origin"), eos_token_id=257))
    changes = {"steps": 2, "lora": 3, "lora_scale": "sqrt_rank", "learning_rate": 0.1}
    changes |= {"lora_modules": ("attention", "experts", "router", "ffn"), "warmup_steps": 0}
    config = configured(
        "hf:origin",
        data__sources=(f"jsonl:{chats(Path())}#messages",),
        **{f"train__{name}": value for name, value in changes.items()},
    )
    assert finetune.run(config, Path("run"))
    convert.run(**{"from": "run", "to": "hf:merged", "dtype": ""})
    convert.run(**{"from": "run", "to": "peft:adapters", "dtype": ""})
    tuned = final_variables(config, Path("run"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    merged, origin = (
        jax.device_get(load_variables(config.model, mesh, f"hf:{name}"))
        for name in ("merged", "origin")
    )
    # float32 sums over the rank, one way by XLA and the other by numpy.
    chex.assert_trees_all_close(merged, tuned, atol=1e-5)
    experts, before = (tree["params"]["layers_1"]["block_0"]["moe"] for tree in (tuned, origin))
    assert all(np.abs(experts[name] - before[name]).max() > 1e-3 for name in experts)
    assert json.loads(Path("adapters/adapter_config.json").read_text())["r"] == 3
    further = {"lora": 4, "lora_from": "adapters", "steps": 1, "learning_rate": 1e-12}
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, **further))
    assert finetune.run(again, Path("again"))
    chex.assert_trees_all_close(final_variables(again, Path("again")), tuned, atol=1e-5)
    for source, target, words in (
        ("hf:origin", "peft:x", "no run with adapters"),
        ("run", "peft:adapters", "there already; delete it"),
    ):
        with pytest.raises(UserError, match=words):
            convert.run(**{"from": source, "to": target, "dtype": ""})
