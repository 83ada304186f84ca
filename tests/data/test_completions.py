"""The strict parser of completions."""

import itertools
import re
import time

import pytest

from data.completions import Completion, parse_completion
from data.special_tokens import COMPLETION_TAGS


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


def test_it_accepts_what_the_expression_of_the_format_accepts():
    """Every word of up to six of these: the expression states the format, in quadratic time."""
    stated = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", flags=re.DOTALL)
    tag = re.compile("|".join(COMPLETION_TAGS))
    accepted = 0
    for length in range(7):
        for parts in itertools.product([*COMPLETION_TAGS, "x", "\n\x1c"], repeat=length):
            text = "".join(parts)
            match = stated.fullmatch(text)
            expected = Completion("", "", False)
            if match is not None and not any(tag.search(block) for block in match.groups()):
                expected = Completion(match[1].strip(), match[2].strip(), True)
            accepted += expected.well_formed
            assert parse_completion(text) == expected, text
    assert accepted > 30


@pytest.mark.parametrize(
    "part",
    ["</think><answer>", "<think>", "<answer>", "</answer>", "<", " ", "\n", "<think", "a", "1,",
     "<think></think>", "</think> ", "<think>x</think> <answer>"],
)  # fmt: skip
@pytest.mark.parametrize(
    "end", ["", "</answer>", "<answer>1</answer>", "</think><answer>1</answer>"]
)
def test_a_million_characters_are_parsed_in_no_time(part, end):
    """Milliseconds; by an expression with two lazy blocks some of these take minutes."""
    text = "<think>" + part * (1_000_000 // len(part)) + end
    began = time.perf_counter()
    parse_completion(text)
    assert time.perf_counter() - began < 1
