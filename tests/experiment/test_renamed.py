"""An old name of a config field is answered with the new one, wherever a person writes it."""

import pytest

from errors import UserError
from experiment.config_files import get_config, with_overrides
from experiment.fields import fields
from experiment.renamed import RENAMED, new_name, with_new_names
from experiment.schema import default_config, parse


def test_every_new_name_is_that_of_a_field_or_section():
    present = [f"{field.name}." for field in fields()]
    for section, names in RENAMED.items():
        for name in names:
            now = new_name(f"{section}.{name}")
            assert any(field.startswith(f"{now}.") for field in present), name
            assert new_name(f"pretrain.{section}.{name}") == f"pretrain.{now}"


def test_no_present_name_is_taken_for_an_old_one():
    assert [field.name for field in fields() if new_name(field.name)] == []
    present = default_config().to_dict()
    assert with_new_names(present) == present


def test_a_record_from_before_a_field_was_there_keeps_what_it_meant():
    """A run that took the mean over layers goes on with it; a new one adds."""
    recorded = default_config().to_dict()
    assert recorded["train"].pop("layer_losses") == "sum"
    assert with_new_names(recorded)["train"]["layer_losses"] == "mean"


def test_a_record_with_a_field_that_is_no_more_is_read():
    recorded = default_config().to_dict()
    before = recorded | {"evaluate": recorded["evaluate"] | {"perplexity_samples": 4}}
    assert with_new_names(before) == recorded


@pytest.mark.parametrize(
    "old, now",
    [
        ("model.width", "model.hidden_size"),
        ("model.attention.heads", "model.mla.num_attention_heads"),
        ("model.mla.heads", "model.mla.num_attention_heads"),
        ("model.attention.gate", "model.mla.gate"),
        ("reinforce.group", "reinforce.group_size"),
    ],
)
def test_an_override_is_answered_with_the_new_name(old, now):
    with pytest.raises(UserError) as error:
        with_overrides(default_config(), [f"--config.{old}=8"])
    assert str(error.value) == f"config.{old}: no such field (it is now {now})"


@pytest.mark.parametrize(
    "line, words",
    [
        ("c.model.width = 8", "config.model.width: no such field (it is now model.hidden_size)"),
        (
            "c.model.moe.update({'experts': 4})",
            "config.model.moe.experts: no such field (it is now model.moe.num_experts)",
        ),
        (
            "c.model.attention.heads = 2",
            "x.py:5: attention: no such field (it is now model.mla)",
        ),
        (
            "c.model.indexer.head_dim = c.model.indexer.width * 2",
            "x.py:5: width: no such field (it is now model.indexer.head_dim)",
        ),
        (
            "c.reinforce.format_reward = 0.0",
            "config.reinforce.format_reward: no such field (it is now reinforce.rewards)",
        ),
        (
            "c.model.expert_matmul = 'by_size'",
            "config.model.expert_matmul = 'by_size': is now 'bucketed'",
        ),
    ],
)
def test_a_config_file_is_answered_with_the_new_name(line, words, tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        f"from configs import base\n\ndef get_config():\n    c = base.get_config()\n    {line}\n"
        "    return c\n"
    )
    with pytest.raises(UserError) as error:
        parse(get_config(str(file)))
    assert words in str(error.value)
