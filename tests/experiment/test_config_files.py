"""Config files are found from any directory, and overrides are read by the type of their field."""

import pytest

from configs import base
from errors import UserError
from experiment.config_files import experiments, get_config, with_overrides


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
