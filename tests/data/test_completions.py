"""The strict parser of completions."""

import pytest

from data.completions import Completion, parse_completion


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("<think>a</think><answer>b</answer>", "a", "b"),
        (" \n<think> a\nc </think>\n <answer> b </answer>\n", "a\nc", "b"),
        ("<think></think><answer></answer>", "", ""),
        ("<think>a < b</think><answer>$x > 1$</answer>", "a < b", "$x > 1$"),
    ],
)
def test_a_well_formed_completion_is_taken_apart(text, thought, answer):
    assert parse_completion(text) == Completion(thought, answer, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "x<think>a</think><answer>b</answer>",
        "<think>a</think>x<answer>b</answer>",
        "<think>a</think><answer>b</answer>x",
        "<think>a</think><answer>b</answer><|eos|>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</think></answer>",
        "<think>a</think><answer>c</answer><think>a</think><answer>b</answer>",
        "<Think>a</Think><answer>b</answer>",
    ],
)
def test_a_malformed_completion_has_no_parts(text):
    assert parse_completion(text) == Completion("", "", False)
