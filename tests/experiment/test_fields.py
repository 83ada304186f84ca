"""`launch.fields` shows the config as it is."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from errors import UserError
from experiment.fields import WIDTH, describe, fields
from experiment.flags import Flag, describe_flags
from experiment.schema import default_config
from model.layer_configs import GQAConfig


def test_every_field_is_shown_with_its_default():
    config = default_config()

    def leaves(section, prefix=""):
        for name, value in section.items():
            if isinstance(value, ConfigDict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    assert {field.name: field.default for field in fields()} == dict(leaves(config))


def test_a_comment_stands_with_its_own_field():
    """Beside the field, above it in several lines, or not at all."""
    meanings = {field.name: field.meaning for field in fields()}
    assert meanings["model.hidden_size"] == "D"
    assert meanings["train.optimizer"].startswith('"adamw" | "muon"')
    assert meanings["train.optimizer"].endswith("(arXiv 2502.16982).")
    assert meanings["train.beta1"] == ""


def test_a_section_shows_its_own_fields_alone():
    lines = [line for line in describe("model.indexer").split("\n") if not line.startswith(" ")]
    assert len(lines) == len(default_config().model.indexer)
    assert all(line.startswith("model.indexer.") for line in lines)


def test_a_section_may_inherit_fields():
    @dataclasses.dataclass(frozen=True)
    class Window(GQAConfig):
        window: int = 128  # keys a query attends to

    shown = {field.name: field.meaning for field in fields(Window())}
    assert shown["window"] == "keys a query attends to"
    assert shown["num_key_value_heads"] == "K"


def test_a_section_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"^modle: no such field or section"):
        describe("modle")


def test_a_terminal_of_80_columns_shows_a_line_as_one():
    names = {field.name for field in fields()}
    long = [line for line in describe().split("\n") if len(line) > WIDTH]
    # A default is written as it is given on a command line, in one piece.
    assert all(line.partition(" = ")[0] in names for line in long)
    flags = {"pretend_devices": Flag(0, "dry run: pretend this CPU is so many devices " * 3)}
    lines = describe_flags(flags)
    assert len(lines) > 1 and max(map(len, lines)) <= WIDTH
    assert all(line.startswith(" " * 26) for line in lines[1:])
