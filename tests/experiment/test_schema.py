"""The schema lets exactly the right configs in, and answers the others in one line."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import base
from errors import UserError
from experiment import schema
from experiment.config_files import with_overrides


@dataclasses.dataclass(frozen=True)
class Inner:
    experts: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    on: bool
    sizes: tuple[float, ...]
    limit: int | None
    inner: Inner


def section(**changes) -> ConfigDict:
    return ConfigDict(
        {
            "name": "a",
            "on": True,
            "sizes": (1, 2.5),
            "limit": None,
            "inner": {"experts": 8, "rate": 1},
        }
        | changes
    )


def test_build_makes_the_annotated_types():
    built = schema.build(Outer, section(sizes=[1, 2.5]), "config")
    assert built == Outer("a", True, (1.0, 2.5), None, Inner(8, 1.0))
    assert (
        type(built.inner.rate) is float
        and type(built.sizes) is tuple
        and type(built.sizes[0]) is float
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nam": 1}, 'config.nam: no such field (did you mean "name"?)'),
        (
            {"inner": {"expert": 8, "rate": 1.0}},
            'config.inner.expert: no such field (did you mean "experts"?)',
        ),
        ({"inner": {"zzz": 8}}, "config.inner.zzz: no such field (has: experts, rate)"),
        (
            {"inner": {"experts": 8}},
            "config.inner.rate: missing (`python -m launch.fields inner.rate` says what it means)",
        ),
        ({"inner": 3}, "config.inner = 3: must be a section with the fields experts, rate"),
        (
            {"inner": {"experts": "many", "rate": 1.0}},
            "config.inner.experts = 'many': must be an int",
        ),
        ({"inner": {"experts": 1.0, "rate": 1.0}}, "config.inner.experts = 1.0: must be an int"),
        ({"inner": {"experts": True, "rate": 1.0}}, "config.inner.experts = True: must be an int"),
        ({"inner": {"experts": 1, "rate": True}}, "config.inner.rate = True: must be a float"),
        ({"on": 1}, "config.on = 1: must be a bool"),
        ({"sizes": (1.0, "x")}, "config.sizes[1] = 'x': must be a float"),
        ({"sizes": "12"}, "config.sizes = '12': must be a tuple, such as \"('a', 'b')\""),
        ({"limit": "x"}, "config.limit = 'x': must be an int"),
    ],
)
def test_build_names_the_field_and_what_it_must_be(changes, message):
    with pytest.raises(UserError) as error:
        schema.build(Outer, section(**changes), "config")
    assert str(error.value) == message


def test_the_schema_parses_and_nothing_is_lost():
    written = base.get_config()
    parsed = dataclasses.asdict(schema.parse(written))
    assert parsed == written.to_dict()


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.seed=-1", "seed = -1: must be at least 0 and below 2.32"),
        ("--config.seed=4294967296", "seed = 4294967296: must be at least 0 and below"),
        ("--config.model.moe.n_group=3", "model.moe.n_group = 3"),
        (
            "--config.tokenizer.path=tok.json",
            'tokenizer.path = .tok.json.: needs tokenizer.kind = "file"',
        ),
    ],
)
def test_parse_refuses_what_does_not_fit_together(override, words):
    with pytest.raises(UserError, match=words):
        schema.parse(with_overrides(base.get_config(), [override]))


REWARDS = "--config.reinforce.rewards="


def test_a_mapping_is_written_whole_on_the_command_line():
    """Its names may have dots, and nothing of the default stays; a config file may assign it."""
    word = REWARDS + "{'answer': 2, 'own_rewards.py:brevity': 0.5}"
    expected = {"answer": 2.0, "own_rewards.py:brevity": 0.5}
    assert schema.parse(with_overrides(base.get_config(), [word])).reinforce.rewards == expected
    assert schema.parse(base.get_config()).reinforce.rewards == {"answer": 1.0, "format": 0.1}
    config = base.get_config()
    config.reinforce.rewards = expected
    assert schema.parse(config).reinforce.rewards == expected
    phases = ConfigDict({"reinforce": config})
    changed = with_overrides(phases, ["--config.reinforce.reinforce.rewards={'answer': 3.0}"])
    assert schema.parse(changed.reinforce).reinforce.rewards == {"answer": 3.0}


@pytest.mark.parametrize(
    "value, words",
    [
        ("answer", "config.reinforce.rewards = 'answer': must be a mapping of names, such as"),
        ("{'answer'}", "must be a mapping of names"),
        ("{1: 2.0}", "must be a mapping of names"),
        ("{'answer': 'much'}", r"config.reinforce.rewards\['answer'\] = 'much': must be a float"),
        ("{'answer': True}", r"config.reinforce.rewards\['answer'\] = True: must be a float"),
        ("{'anwser': 1.0}", r"reinforce.rewards: no reward 'anwser' \(did you mean 'answer'\?"),
        ("{}", "must name at least one reward"),
        ("(" * 10_000, "must be a mapping of names"),
    ],
)
def test_a_mapping_that_is_none_is_one_line(value, words):
    with pytest.raises(UserError, match=words):
        schema.parse(with_overrides(base.get_config(), [REWARDS + value]))


def test_a_name_within_a_mapping_is_no_field():
    with pytest.raises(UserError, match=r"rewards.answer: no such field .* not a section"):
        with_overrides(base.get_config(), ["--config.reinforce.rewards.answer=2.0"])


def test_the_fields_that_rewards_had_are_answered_with_the_present_one():
    with pytest.raises(UserError, match=r"answer_reward: no such field .it is now reinforce.rew"):
        with_overrides(base.get_config(), ["--config.reinforce.answer_reward=2.0"])


def test_an_indexer_stage_needs_an_indexer():
    with pytest.raises(UserError, match="needs an indexer"):
        schema.parse(
            with_overrides(
                base.get_config(),
                ["--config.train.stage=sparse", "--config.model.indexer.n_heads=0"],
            )
        )
