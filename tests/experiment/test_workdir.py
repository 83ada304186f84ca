"""A workdir belongs to one run, which may be extended and moved and nothing else."""

import json
import os

import pytest

from configs import base
from errors import UserError
from experiment.config_files import with_overrides
from experiment.fields import fields as fields_of
from experiment.schema import parse
from experiment.workdir import MAY_CHANGE, open_workdir, record_config, recorded_config


@pytest.fixture(scope="module")
def config():
    return parse(base.get_config())


def changed(*words):
    return parse(with_overrides(base.get_config(), [f"--config.{word}" for word in words]))


def test_a_record_is_written_once_and_lets_the_same_config_in(tmp_path, config):
    record_config(tmp_path / "run", config, "pretrain")
    before = (tmp_path / "run/config.json").read_text()
    record_config(tmp_path / "run", config, "pretrain")
    assert (tmp_path / "run/config.json").read_text() == before
    assert os.listdir(tmp_path / "run") == ["config.json"]
    assert parse(recorded_config(tmp_path / "run")) == config


def test_a_refusal_names_the_first_difference(tmp_path, config):
    record_config(tmp_path, config, "pretrain")
    with pytest.raises(UserError) as error:
        record_config(tmp_path, changed("train.learning_rate=0.003", "train.beta1=0.8"), "pretrain")
    assert (
        str(error.value)
        == f"{tmp_path} belongs to another config (train.learning_rate: 0.001 there, 0.003 here); "
        "choose another --workdir"
    )
    assert parse(recorded_config(tmp_path)) == config


def test_another_command_is_refused(tmp_path, config):
    record_config(tmp_path, config, "pretrain")
    with pytest.raises(UserError, match=r"belongs to launch\.pretrain"):
        record_config(tmp_path, config, "reinforce")


@pytest.mark.parametrize("lines, free", [(None, True), ("", True), ('{"step": 1}\n', False)])
def test_a_run_that_did_not_begin_leaves_the_directory_free(tmp_path, config, lines, free):
    """Its person mends the config and gives the command again; what a run has recorded stays its
    own.
    """
    with (
        pytest.raises(UserError, match="no such file"),
        open_workdir(tmp_path, config, "pretrain"),
    ):
        (tmp_path / "tokenizer.json").write_text("{}")
        if lines is not None:
            (tmp_path / "metrics.jsonl").write_text(lines)
        raise UserError("no such file")
    assert (
        (tmp_path / "config.json").exists() is (tmp_path / "tokenizer.json").exists() is (not free)
    )


def test_a_failed_try_to_go_on_takes_nothing_away(tmp_path, config):
    record_config(tmp_path, config, "pretrain")
    with pytest.raises(UserError), open_workdir(tmp_path, config, "pretrain"):
        raise UserError("no such file")
    assert parse(recorded_config(tmp_path)) == config


def test_a_field_that_did_not_exist_yet_has_its_default(tmp_path, config):
    record_config(tmp_path, config, "pretrain")
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["model"]["causal_parts"], record["config"]["evaluate"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert parse(recorded_config(tmp_path)) == config
    record_config(tmp_path, config, "pretrain")
    with pytest.raises(UserError, match=r"model\.causal_parts: 4 there, 2 here"):
        record_config(tmp_path, changed("model.causal_parts=2"), "pretrain")


def test_a_run_may_be_extended_and_moved(tmp_path, config):
    record_config(tmp_path, config, "pretrain")
    longer = changed("train.steps=5000", "train.log_every=1", "mesh.fsdp=2", "train.microbatches=2")
    record_config(tmp_path, longer, "pretrain")
    assert parse(recorded_config(tmp_path)) == longer


def test_may_change_names_fields_that_exist(config):
    fields = {field.name for field in fields_of(config)}
    assert set(MAY_CHANGE) <= fields


def test_a_damaged_record_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text('{"command": ')
    with pytest.raises(UserError, match="not the record of a run"):
        record_config(tmp_path, config, "pretrain")


@pytest.mark.parametrize(
    "recorded, rewards",
    [
        ({"answer_reward": 2.0, "format_reward": 0.0}, {"answer": 2.0, "format": 0.0}),
        ({"format_reward": 0.1, "answer_reward": 1.0}, {"answer": 1.0, "format": 0.1}),
        ({}, {"answer": 1.0, "format": 0.1}),
        ({"rewards": {"answer": 1.0}}, {"answer": 1.0}),
        ({"rewards": {"own.py:brevity": 0.5}}, {"own.py:brevity": 0.5}),
    ],
)
def test_rewards_of_any_record_are_those_of_the_run(tmp_path, recorded, rewards):
    """Those that it had as two fields become a mapping, and one that it lacks is not added."""
    config = parse(with_overrides(base.get_config(), [f"--config.reinforce.rewards={rewards}"]))
    record_config(tmp_path, config, "reinforce")
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["reinforce"]["rewards"]
    record["config"]["reinforce"] |= recorded
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert parse(recorded_config(tmp_path)) == config
    record_config(tmp_path, config, "reinforce")
    other = parse(with_overrides(base.get_config(), [f"--config.reinforce.rewards={OTHER}"]))
    with pytest.raises(UserError, match=r"belongs to another config \(reinforce.rewards\."):
        record_config(tmp_path, other, "reinforce")


OTHER = {"answer": 1.0, "format": 0.1, "own.py:other": 1.0}
