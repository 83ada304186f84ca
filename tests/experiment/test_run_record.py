"""A run records what made it: command, commit, and what its config changes."""

import json
import shutil
import subprocess
import sys

import pytest

from errors import UserError
from experiment import run_record
from experiment.run_record import changed_fields, command_line, commit, origin_of, record_start
from experiment.schema import Config, default_config
from experiment.workdir import record_config
from model.config import ModelConfig
from train.config import TrainConfig

MODEL = ModelConfig(vocab_size=300)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            ["/a/b/python3", "-m", "launch.pretrain", "--workdir=a b", "--config=c.py"],
            "python3 -m launch.pretrain '--workdir=a b' --config=c.py",
        ),
        (["/a/python", "/a/bin/athanor", "pretrain", "--x=$y"], "athanor pretrain '--x=$y'"),
        (["python", "mine.py"], "python mine.py"),
    ],
)
def test_the_command_can_be_pasted(monkeypatch, argv, shown):
    monkeypatch.setattr(sys, "orig_argv", argv)
    assert command_line() == shown


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git here")

    def git(*words: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *named, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(run_record, "CHECKOUT", tmp_path)
    assert commit() == ""  # installed, not checked out: whatever is above is another's
    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    assert commit() == ""  # nothing is committed yet
    git("commit", "-m", "x")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "x").write_text("2")
    assert commit() == git("rev-parse", "HEAD") + ", with uncommitted changes"
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


def test_changed_fields_are_those_that_differ_from_the_defaults():
    config = default_config()
    assert changed_fields(config) == {}
    config.train.steps = 7
    config.model.mla.q_lora_rank = 5
    config.seed = 3
    config.data.mixture = (0.5, 0.5)
    config.reinforce.rewards = {"answer": 2.0}
    assert changed_fields(config) == {
        "train.steps": 7,
        "model.mla.q_lora_rank": 5,
        "data.mixture": (0.5, 0.5),
        "reinforce.rewards": {"answer": 2.0},
    }


def test_each_start_is_recorded_and_those_before_the_first_step_are_forgotten(tmp_path):
    config = Config(seed=5, train=TrainConfig(steps=9))
    assert origin_of(tmp_path) is None
    record_config(tmp_path, config, "pretrain")
    record_start(tmp_path, MODEL)
    record_start(tmp_path, MODEL)  # the first one never came to a step
    origin = origin_of(tmp_path)
    assert origin is not None and len(origin.starts) == 1
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    record_start(tmp_path, MODEL)
    origin = origin_of(tmp_path)
    assert origin is not None and len(origin.starts) == 2
    assert (origin.command, origin.seed, origin.steps) == ("pretrain", 5, 9)
    assert origin.sources == list(config.data.sources)
    assert origin.changes["train.steps"] == 9 and "seed" not in origin.changes
    start = origin.starts[-1]
    assert start.keys() == {"time", "command", "commit", "parameters", "devices", "versions"}
    assert start["parameters"] > 0 and "jax" in start["versions"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": 3}', '{"starts": [1, {"a": 1}]}'])
def test_a_damaged_record_of_starts_stops_nothing(tmp_path, text):
    record_config(tmp_path, Config(), "pretrain")
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    assert origin_of(tmp_path) is not None
    record_start(tmp_path, MODEL)
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) in (1, 2)


@pytest.mark.parametrize("text", ["{", "[]", '{"command": "x"}', '{"config": {}}', "\xff"])
def test_a_damaged_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        origin_of(tmp_path)
