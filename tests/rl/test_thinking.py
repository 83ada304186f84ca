"""Thoughts that are forced to a length: what is measured of them, and where there are none."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from rl.budgets import MarkedText, budget_of, check_thinks, most_tokens, sampling_budget
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.generate import Completion
from rl.problems import problems_to_evaluate
from rl.thinking import _measured, accuracy_by_thinking
from rl.trajectory import Role, Trajectory
from tests import tiny
from tests.rl.test_engine import MESH
from train.setup import Setup

TOKENIZER = bytes_tokenizer()
EVALUATE = EvaluateConfig(samples=2, thinking=(4, 12), thinking_answer_tokens=6, bootstrap=10)


def test_marks_are_what_the_model_knows_them_as():
    """The tokenizer's own `encode` makes letters of them, as of what a user says."""
    end = TOKENIZER.special_token_id("</think>")
    assert end is not None
    assert MarkedText(TOKENIZER).encode("a</think>") == [*TOKENIZER.encode("a"), end]
    assert end not in TOKENIZER.encode("a</think>")
    ids = budget_of(TOKENIZER, 4, EVALUATE).tokenizer.encode("\n</think>")
    assert ids.count(end) == 1


@pytest.mark.parametrize("template, source", [("plain", ""), ("checkpoint", "no thought")])
def test_a_template_without_a_thought_is_one_line(template, source):
    own = SimpleNamespace(
        chat_template=SimpleNamespace(source=source), special_token_id=lambda text: None
    )
    with pytest.raises(UserError, match=r"evaluate.thinking = \(8,\): the chat template"):
        check_thinks(cast(Any, own), template, "evaluate.thinking = (8,)", "leave it empty")
    thinks = SimpleNamespace(
        chat_template=SimpleNamespace(source="<think> ... </think>"),
        special_token_id=lambda text: None,
    )
    check_thinks(cast(Any, thinks), "checkpoint", "", "")
    check_thinks(TOKENIZER, "think", "", "")


def completed(*parts: tuple[str, Role]) -> Completion:
    """A completion after a prompt of two ids, of texts and who wrote them."""
    ids, roles = [65, 66], [Role.PROMPT] * 2
    for text, role in parts:
        added = MarkedText(TOKENIZER).encode(text)
        ids, roles = ids + added, roles + [role] * len(added)
    zeros = np.zeros(len(ids), np.float32)
    tokens, versions = np.asarray(ids, np.int32), np.zeros(len(ids), np.int32)
    made = Trajectory(tokens, np.asarray(roles, np.int8), zeros, zeros, versions, "stop")
    return Completion(made, "")


def test_what_is_measured_of_a_thought():
    """By hand: a byte a letter, the end of a thought one token; what is injected does not count."""
    budget = budget_of(TOKENIZER, 9, EvaluateConfig(thinking_waits=2))
    model, injected = Role.MODEL, Role.INJECTED
    ended = completed(("hm</think>yes", model))
    assert _measured(ended, budget) == (3, 6, False, 0)
    cut = completed(("hm hm hm ", model), (budget.interruption, injected), ("yes", model))
    assert _measured(cut, budget) == (9, 12, True, 0)
    waited = completed(
        ("hm", model), ("Wait", injected), ("so", model), ("Wait", injected), ("x</think>a", model)
    )
    assert _measured(waited, budget) == (6, 7, False, 2)
    both = completed(("hm", model), ("Wait", injected), ("so long", model),
                     (budget.interruption, injected), ("a", model))  # fmt: skip
    assert _measured(both, budget) == (9, 10, True, 1)
    assert _measured(completed(("hm", model)), budget) == (2, 2, False, 0)


@pytest.mark.heavy
def test_every_budget_is_kept_in_one_engine():
    """A model of random weights does not end its thoughts: they are cut, and it goes on."""
    model = tiny.model_config(
        num_nextn_predict_layers=0, vocab_size=TOKENIZER.vocab_size, initializer_range=0.15
    )
    setup = Setup(model, TOKENIZER, MESH)
    sampling = SamplingConfig(max_prompt_tokens=160, max_new_tokens=8)
    reinforce = ReinforceConfig(task="task:arithmetic")
    problems = problems_to_evaluate(reinforce.task, 3, sampling, TOKENIZER, "think")
    with jax.set_mesh(MESH):
        rows, samples = accuracy_by_thinking(
            setup, sampling, EVALUATE, reinforce, "think", tiny.variables(model), problems,
            jax.random.key(0),
        )  # fmt: skip
    assert [row["thinking"] for row in rows] == [4, 12] and len(samples) == 2 * 3 * 2
    for row in rows:
        assert row["thinking_tokens"] <= row["thinking"] and row["cut"] > 0.5
        assert row["thinking_tokens"] <= row["tokens"] <= row["thinking_tokens"] + 6
        assert row["accuracy"]["mean"] == 0 and row["samples"] == 2
    assert rows[0]["thinking_tokens"] < rows[1]["thinking_tokens"]
    cut = [line for line in samples if "time is up" in line["completion"]]
    assert len(cut) > len(samples) / 2
    assert most_tokens(budget_of(TOKENIZER, 12, EVALUATE)) > 12 + 6


def test_a_budget_of_rollouts_fits_or_is_one_line():
    sampling = SamplingConfig(max_new_tokens=90, thinking=20, thinking_answer_tokens=12)
    budget = sampling_budget(TOKENIZER, "think", sampling)
    assert budget is not None and most_tokens(budget) == 90 and sampling.most_sampled == 32
    assert sampling_budget(TOKENIZER, "think", SamplingConfig()) is None
    assert SamplingConfig().most_sampled == SamplingConfig().max_new_tokens
    short = dataclasses.replace(sampling, max_new_tokens=89)
    with pytest.raises(UserError, match=r"max_new_tokens = 89: sampling.thinking = 20, .* take 90"):
        sampling_budget(TOKENIZER, "think", short)
    own = SimpleNamespace(chat_template=None, special_token_id=lambda text: None)
    with pytest.raises(
        UserError, match=r"^sampling.thinking = 20: the chat template .* set it to 0"
    ):
        sampling_budget(cast(Any, own), "checkpoint", sampling)
