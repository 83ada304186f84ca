"""A wrong value of a section is one line that names it."""

import dataclasses
import typing
from collections.abc import Mapping

import pytest

from configs import base
from errors import UserError
from experiment import schema
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig

SECTIONS = {"reinforce": ReinforceConfig, "sampling": SamplingConfig, "evaluate": EvaluateConfig}


def build(section: str, **changes):
    values = {**base.get_config()[section].to_dict(), **changes}
    return schema.build(SECTIONS[section], values, f"config.{section}")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_schema_is_the_dataclass_with_its_defaults(section):
    """The same fields and types; and the defaults are valid."""
    defaults = base.get_config()[section].to_dict()
    types = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])}
    sections = {name: kind for name, kind in types.items() if dataclasses.is_dataclass(kind)}
    types |= {name: dict for name, kind in types.items() if kind == Mapping[str, float]}
    types |= dict.fromkeys(sections, dict)
    types |= {name: tuple for name, kind in types.items() if typing.get_origin(kind) is tuple}
    assert types == {name: type(value) for name, value in defaults.items()}
    assert dataclasses.asdict(SECTIONS[section]()) == defaults
    assert build(section) == SECTIONS[section]()


@pytest.mark.parametrize(
    "section, changes, message",
    [
        (
            "sampling",
            {"temperature": -0.5},
            "sampling.temperature = -0.5: must be 0 (greedy) or positive",
        ),
        (
            "sampling",
            {"temperature": float("nan")},
            "sampling.temperature = nan: must be 0 (greedy) or positive",
        ),
        ("sampling", {"top_k": -1}, "sampling.top_k = -1: must be 0 (all) or positive"),
        ("sampling", {"top_p": 1.3}, "sampling.top_p = 1.3: must be in (0, 1]"),
        ("sampling", {"top_p": 0.0}, "sampling.top_p = 0.0: must be in (0, 1]"),
        ("sampling", {"max_prompt_tokens": 0}, "sampling.max_prompt_tokens = 0: must be positive"),
        ("sampling", {"max_new_tokens": 0}, "sampling.max_new_tokens = 0: must be positive"),
        (
            "sampling",
            {"attention": "full"},
            "sampling.attention = 'full': must be one of sparse, dense",
        ),
        (
            "reinforce",
            {"algorithm": "drgrpo"},
            "reinforce.algorithm = 'drgrpo': did you mean 'dr_grpo'?",
        ),
        ("reinforce", {"task": "arithmetic"}, "reinforce.task = 'arithmetic': must be 'task:NAME'"),
        ("reinforce", {"prompts_per_step": 0}, "reinforce.prompts_per_step = 0: must be positive"),
        ("reinforce", {"epochs": 0}, "reinforce.epochs = 0: must be positive"),
        ("reinforce", {"minibatches": 0}, "reinforce.minibatches = 0: must be positive"),
        (
            "reinforce",
            {"minibatches": 3},
            "reinforce.minibatches = 3: does not divide "
            "reinforce.prompts_per_step * reinforce.group_size = 128",
        ),
        ("reinforce", {"group_size": 1}, "reinforce.group_size = 1: must be at least 2"),
        (
            "reinforce",
            {"kl_weight": -0.1},
            "reinforce.kl_weight = -0.1: must be -1 (the algorithm's own), 0 (off) or positive",
        ),
        ("reinforce", {"kl_weight": float("nan")}, "reinforce.kl_weight = nan:"),
        (
            "reinforce",
            {"rewards": {"answer": float("inf")}},
            "reinforce.rewards: the weight of 'answer' = inf: must be finite",
        ),
        (
            "reinforce",
            {"old_logprobs": "none"},
            "reinforce.old_logprobs = 'none': must be one of sampler, trainer",
        ),
        (
            "reinforce",
            {"indexer": "learned"},
            "reinforce.indexer = 'learned': must be one of trained, frozen",
        ),
        (
            "reinforce",
            {"truncated": "drop"},
            "reinforce.truncated = 'drop': must be one of reward, no_reward, mask",
        ),
        (
            "reinforce",
            {"trace_completions": -2},
            "reinforce.trace_completions = -2: must be -1 (all) or more",
        ),
        ("evaluate", {"reward": "anwser"}, "evaluate.reward: no reward 'anwser' (did you mean"),
        ("evaluate", {"success": float("nan")}, "evaluate.success = nan: must be finite"),
        ("evaluate", {"problems": -1}, "evaluate.problems = -1: must be 0 (none) or positive"),
        ("evaluate", {"samples": 0}, "evaluate.samples = 0: must be positive"),
        ("evaluate", {"bootstrap": 0}, "evaluate.bootstrap = 0: must be positive"),
        (
            "evaluate",
            {"ks": (1, 9)},
            "evaluate.ks = (1, 9): must be between 1 and evaluate.samples",
        ),
        ("evaluate", {"ks": (4, 2)}, "evaluate.ks = (4, 2): must rise"),
        (
            "evaluate",
            {"temperatures": (1.0, -1.0)},
            "evaluate.temperatures = (1.0, -1.0): must be 0",
        ),
        (
            "evaluate",
            {"temperatures": (1.0, 1.0)},
            "evaluate.temperatures = (1.0, 1.0): must differ",
        ),
        (
            "evaluate",
            {"consensus_ties": "last"},
            "evaluate.consensus_ties = 'last': must be one of",
        ),
        ("evaluate", {"thinking": (0,)}, "evaluate.thinking = (0,): must be positive"),
        ("evaluate", {"thinking_waits": -1}, "evaluate.thinking_waits = -1: must not be negative"),
        (
            "evaluate",
            {"infill_documents": -1},
            "evaluate.infill_documents = -1: must be 0 (none) or positive",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(section, changes, message):
    with pytest.raises(UserError) as caught:
        build(section, **changes)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "section, changes",
    [
        ("sampling", {"temperature": 0.0}),
        ("sampling", {"top_p": 1e-9}),
        ("reinforce", {"kl_weight": -1.0}),
        ("reinforce", {"kl_weight": 0.0}),
        ("reinforce", {"minibatches": 128}),
    ],
)
def test_the_ends_of_a_range_are_allowed(section, changes):
    build(section, **changes)
