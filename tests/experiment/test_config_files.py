"""Config files are found from any directory, and overrides are read by the type of their field."""

import shutil

import pytest

from configs import base
from errors import UserError
from experiment.config_files import (
    experiments,
    get_config,
    with_checkpoint_fields,
    with_overrides,
)
from experiment.inputs import model_config
from experiment.schema import parse
from experiment.workdir import record_config


@pytest.mark.parametrize(
    "words, sources",
    [
        (["--config.data.sources=('text:src/**/*.py',)"], ("text:src/**/*.py",)),
        (["--config.data.sources=text:src/**/*.py"], ("text:src/**/*.py",)),
        (
            ["--config.data.sources=('jsonl:a b.gz#text', 'stdlib')"],
            ("jsonl:a b.gz#text", "stdlib"),
        ),
        (["--config.data.sources=stdlib", "--config.data.sources=text:b"], ("stdlib", "text:b")),
    ],
)
def test_tuples_can_be_overridden(words, sources):
    assert with_overrides(base.get_config(), words).data.sources == sources


def test_overrides_are_read_by_the_type_of_the_field():
    words = [
        "--config.train.learning_rate=1",
        "--config.model.tie_word_embeddings",
        "--config.data.cross_document_attention=false",
        "--config.init_from=7",
    ]
    config = with_overrides(base.get_config(), words)
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert (
        config.model.tie_word_embeddings is True and config.data.cross_document_attention is False
    )
    assert config.init_from == "7"


def test_the_repositorys_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_config("configs/quickstart.py:warmup").train.stage == "warmup"
    assert "configs/quickstart.py" in experiments() and "configs/base.py" not in experiments()
    with pytest.raises(UserError, match=r"no such file \(there is configs/quickstart.py\)"):
        get_config("configs/quick.py")


def test_the_working_directorys_configs_come_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text(
        "from configs import base\n\ndef get_config():\n"
        "    c = base.get_config()\n    c.seed = 7\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    assert get_config("configs/quickstart.py").seed == 7
    assert experiments() == ["configs/quickstart.py"]


def test_a_run_to_start_from_takes_its_model_along(tmp_path):
    """A config that says nothing of its model has that of the run; what it says, it keeps, and the
    command line has the last word.
    """
    before = base.get_config()
    before.model.hidden_size, before.model.mla.q_lora_rank = 64, 24
    before.model.rope.rope_theta, before.sampling.attention = 100.0, "dense"
    record_config(tmp_path, parse(before), "pretrain")

    config = base.get_config()
    config.init_from = str(tmp_path / "checkpoints")
    config.model.rope.rope_theta = 5e4
    found = with_checkpoint_fields(config, ["--config.model.mla.q_lora_rank=48"])
    assert (found.model.hidden_size, found.model.mla.q_lora_rank) == (64, 48)
    assert (found.model.rope.rope_theta, found.sampling.attention) == (5e4, "dense")
    assert found.train.to_dict() == config.train.to_dict()
    config.init_from = str(tmp_path / "elsewhere")
    assert with_checkpoint_fields(config, ()).model.hidden_size != 64


def test_a_run_that_has_begun_has_its_model_in_its_own_record(tmp_path):
    """Whatever became of the run that it came from meanwhile."""
    origin, workdir = tmp_path / "origin", tmp_path / "run"
    before = base.get_config()
    before.model.hidden_size = 64
    origin.mkdir()
    record_config(origin, parse(before), "pretrain")
    config = base.get_config()
    config.init_from = str(origin)
    begun = parse(with_checkpoint_fields(config, (), workdir))
    workdir.mkdir()
    record_config(workdir, begun, "finetune")
    shutil.rmtree(origin)
    assert parse(with_checkpoint_fields(config, (), workdir)) == begun
    assert model_config(str(workdir), ()).model.hidden_size == 64
    config.init_from = str(tmp_path / "another")
    assert with_checkpoint_fields(config, (), workdir).model.hidden_size != 64
