"""What the tags of a completion mark, in tokens: whole tags, split ones, and what goes wrong."""

import dataclasses
import re

import numpy as np
import pytest

from data.chat import encode_prompt
from data.tokenizer import Tokenizer
from data.tokenizer_training import bytes_tokenizer, train_bpe
from rl import spans
from rl.spans import TAGS, parts_of, spans_of
from rl.trajectory import Role, Trajectory
from tests.trajectories import trajectory

BYTES = bytes_tokenizer()


def written(*turns: tuple[Role, str]) -> Trajectory:
    """A trajectory of bytes; tags are the characters of a text, a token each."""
    ids, roles = [], []
    for role, text in turns:
        ids += BYTES.encode(text)
        roles += [role] * (len(ids) - len(roles))
    return dataclasses.replace(trajectory([], ids), roles_T=np.asarray(roles, np.int8))


def texts_of(each: Trajectory, tokenizer: Tokenizer = BYTES) -> dict[str, list[str]]:
    """The text of each span."""
    return {
        name: [
            tokenizer.decode(each.tokens_T[start:end].tolist(), skip_special_tokens=False)
            for start, end in found
        ]
        for name, found in spans_of(each, tokenizer).items()
    }


CASES = {
    "whole": (
        "<think>hm</think><answer>4</answer>.",
        {"thought": ["<think>hm</think>"], "answer": ["<answer>4</answer>"]},
    ),
    "nothing": ("4, I think", {}),
    "not closed": ("a<think>hm", {"thought": ["<think>hm"]}),
    "not opened": ("hm</think>4", {}),
    "twice": ("<answer>4</answer> <answer>5", {"answer": ["<answer>4</answer>", "<answer>5"]}),
    "opened twice": (
        "<think>a<think>b</think>c</think>",
        {"thought": ["<think>a<think>b</think>"]},
    ),
    "a call in a thought": (
        "<think>a<tool_call>{}</tool_call>b</think>",
        {
            "thought": ["<think>a<tool_call>{}</tool_call>b</think>"],
            "tool_call": ["<tool_call>{}</tool_call>"],
        },
    ),
    "an inner one is not closed": (
        "<think>a<answer>4</think>5",
        {"thought": ["<think>a<answer>4</think>"], "answer": ["<answer>4"]},
    ),
    "a tag cut short": ("<think>hm</thin", {"thought": ["<think>hm</thin"]}),
    "beside characters of several bytes": (
        "é🙂<answer>🙂</answer>🙂",
        {"answer": ["<answer>🙂</answer>"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_spans_of_a_text(case):
    text, expected = CASES[case]
    each = written((Role.PROMPT, "<think><answer>no</answer>?"), (Role.MODEL, text))
    assert texts_of(each) == expected


def test_a_tag_at_the_end_of_what_was_read_opens():
    """As templates do that end a prompt with <think>, or a turn."""
    each = written(
        (Role.PROMPT, "2 + 2?<think>\n"),
        (Role.MODEL, "hm</think>4"),
        (Role.TOOL, "no <think>"),
        (Role.MODEL, "oh"),
    )
    assert texts_of(each) == {"thought": ["hm</think>", "oh"]}


def test_each_turn_is_read_by_itself_and_what_a_tool_says_is_text():
    each = written(
        (Role.PROMPT, "?"),
        (Role.MODEL, "<think>a<tool_call>f"),
        (Role.TOOL, "</think><answer>4</answer>"),
        (Role.MODEL, "b</think><answer>5</answer>"),
    )
    assert texts_of(each) == {
        "thought": ["<think>a<tool_call>f"],
        "tool_call": ["<tool_call>f"],
        "answer": ["<answer>5</answer>"],
    }


def test_what_was_injected_closes_a_thought():
    each = written(
        (Role.PROMPT, "?"),
        (Role.MODEL, "<think>a"),
        (Role.INJECTED, "time is up</think>"),
        (Role.MODEL, "<answer>4</answer>"),
    )
    each = dataclasses.replace(each, spans=spans_of(each, BYTES))
    assert [(part, end - start) for part, start, end in parts_of(each)] == [
        ("prompt", 1),
        ("thought", 8),
        ("injected", 18),
        ("answer", 18),
    ]


def test_parts_are_the_innermost_spans_and_have_every_token_once():
    each = written((Role.PROMPT, "?"), (Role.MODEL, "x<think>a<tool_call>f</tool_call>b</think>"))
    each = dataclasses.replace(each, spans=spans_of(each, BYTES))
    parts = parts_of(each)
    assert [part for part, _, _ in parts] == ["prompt", "model", "thought", "tool_call", "thought"]
    assert [start for _, start, _ in parts] == [0, *(end for _, _, end in parts[:-1])]
    assert parts[-1][2] == len(each.tokens_T)


@pytest.mark.parametrize("block", [1, 5, 256])
def test_tokens_of_a_tag_whatever_they_are(block, monkeypatch):
    """Characters that merges have glued to what stands beside them, against a count of bytes; the
    same wherever a block of tokens ends.
    """
    monkeypatch.setattr(spans, "BLOCK", block)
    glued = train_bpe(["é</think><answer>4</answer>; x<think>n🙂<tool_call>é."] * 80, 330)
    backend, rng, split = glued._backend, np.random.default_rng(0), 0
    pieces = [
        "x",
        "é",
        "🙂",
        " 4",
        ";",
        "<answer",
        *(tag for pair in TAGS.values() for tag in pair),
    ]
    for _ in range(30):
        text = "".join(rng.choice(pieces, rng.integers(0, 40)))
        ids = glued.encode(text)
        # A token of byte-level BPE is written with a character for each of its bytes.
        ends = np.cumsum([0, *(len(backend.id_to_token(one) or "") for one in ids)])
        pattern = "|".join(tag for pair in TAGS.values() for tag in pair).encode()
        expected = [
            (
                match[0].decode(),
                int(np.searchsorted(ends, match.start(), side="right")) - 1,
                int(np.searchsorted(ends, match.end(), side="left")),
            )
            for match in re.finditer(pattern, text.encode())
        ]
        assert spans._find_tags(np.asarray(ids), glued, TAGS) == expected
        split += sum(
            ends[first] != match.start()
            for (_, first, _), match in zip(
                expected, re.finditer(pattern, text.encode()), strict=True
            )
        )
    assert split > 20, "tags that begin within a token"


def test_a_tag_that_is_one_id():
    ids = encode_prompt([{"role": "user", "content": "?"}], BYTES, "think")
    tags = [BYTES.special_token_id(tag) or 0 for tag in ("<think>", "</think>", "<|eos|>")]
    each = trajectory(ids, [tags[0], *BYTES.encode("hm"), *tags[1:]])
    assert spans_of(each, BYTES) == {"thought": ((len(ids), len(ids) + 4),)}
