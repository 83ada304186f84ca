"""launch.reinforce with sampling.thinking: thoughts that are cut, stopped and resumed in parts."""

import re
from pathlib import Path

import chex
import numpy as np
import pytest

from errors import UserError
from experiment.schema import Config
from launch import reinforce
from tests.launch.documented_metrics import check_documented
from tests.launch.test_partial_rollouts import traces
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401
    lines,
    run_of,
)
from tests.launch.test_training_commands import final_variables, stopped_at

pytestmark = pytest.mark.command

THOUGHT, ANSWER, PHRASE = 24, 40, 58  # tokens; of the phrase those of a tokenizer of bytes


def cut(**changes) -> Config:
    """Thoughts of 24 tokens at most and answers of 40, some of them in flight after a step."""
    options = {
        "sampling__thinking": THOUGHT,
        "sampling__thinking_answer_tokens": ANSWER,
        "sampling__max_new_tokens": THOUGHT + PHRASE + ANSWER,
        "reinforce__prompts_per_step": 4,
        "reinforce__prompts_in_flight": 6,
        "reinforce__rollout_tokens": 100,
        "reinforce__trace_completions": -1,
        "sampling__slots": 6,
        "train__steps": 4,
        "train__save_every": 2,
    }
    return run_of("length", **options | changes)


def shape(trace: dict) -> str:
    """The author of each token behind the prompt, a letter each: m(odel) or i(njected)."""
    letters = {"prompt": "", "model": "m", "injected": "i"}
    return "".join(letters[role] for role in trace["roles"])


def test_a_resumed_run_is_the_one_that_never_stopped(monkeypatch):
    """To the bit. A completion that goes on in a later step keeps to its budget, in its thought
    and in its answer, and what follows the phrase has the log-probs of the trainer.
    """
    config = cut()
    assert reinforce.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not reinforce.run(config, Path("parts"))
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    assert traces("parts") == traces("whole")
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    check_documented("whole", "parts", "thinking")
    found = traces("whole")
    shapes = [shape(each) for each in found]
    interrupted = [text for text in shapes if "i" in text]
    assert len(interrupted) > len(shapes) / 2
    for text in interrupted:
        assert re.fullmatch(f"m{{{THOUGHT}}}i{{{PHRASE}}}m{{1,{ANSWER}}}", text), text
    assert all(len(text) <= THOUGHT + ANSWER for text in shapes if "i" not in text)
    # Some went on within their thought, and some within their answer.
    versions = [np.array(each["versions"]) for each in found]
    changed = [np.flatnonzero(np.diff(v[v >= 0])) + 1 for v in versions]
    places = np.concatenate(changed)
    assert (places < THOUGHT).any() and (places > THOUGHT).any()
    measured = lines("whole")
    assert max(line["completions/max_length"] for line in measured) <= THOUGHT + ANSWER
    ratio = np.average(
        [line["completions/interrupted_ratio"] for line in measured],
        weights=[line["groups"] for line in measured],
    )
    assert ratio == pytest.approx(len(interrupted) / len(shapes))
    # Tokens of a policy before are not compared; what rounding makes of the others is below 1e-4.
    largest = max(line["sampling/sampling_logp_difference/max"] for line in measured)
    assert 0 < largest < 1e-4


def test_what_does_not_fit_is_one_line_before_a_step():
    with pytest.raises(
        UserError,
        match=r"^sampling.max_new_tokens = 121: sampling.thinking = 24, the phrase that ends a "
        r"thought, of 58 tokens, and sampling.thinking_answer_tokens = 40 take 122; raise it",
    ):
        reinforce.run(cut(sampling__max_new_tokens=THOUGHT + PHRASE + ANSWER - 1), Path("no"))
    with pytest.raises(UserError, match=r"sampling.thinking = -1: must not be negative"):
        cut(sampling__thinking=-1)
    with pytest.raises(UserError, match=r"sampling.thinking_answer_tokens = 0: must be positive"):
        cut(sampling__thinking_answer_tokens=0)
