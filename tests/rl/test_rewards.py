"""Right answers are paid, and nothing else is: not another answer, and not a hack."""

import itertools
import math
import time
from decimal import Decimal

import pytest

from rl.rewards import REWARDS, total_reward
from rl.rewards.answer import answer_reward, format_reward, normalise


def completion(answer: str, thought: str = "4 and 5 make 9.") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("found", ["9", "09", " 9 ", "9\n", "9.0", "9.00", "+9", "009.0"])
def test_numbers_compare_by_value(found):
    assert answer_reward(completion(found), "9") == 1
    assert answer_reward(completion("9"), found) == 1


@pytest.mark.parametrize(
    "found, right",
    [
        ("1,000", "1000"), ("1000", "1,000"), ("1,234,567.50", "1234567.5"),
        ("-0", "0"), (".5", "0.5"), ("-3", "-3.0"),
        ("new  york\n", "new york"), ("a,b", "a,b"), ("x = 9", "x = 9"),
    ],
)  # fmt: skip
def test_right_answers(found, right):
    assert answer_reward(completion(found), right) == 1


@pytest.mark.parametrize(
    "found, right",
    [
        ("8", "9"), ("-9", "9"), ("9 apples", "9"), ("$9", "9"), ("9%", "9"), ("x = 9", "9"),
        ("9.", "9"), ("9 9", "99"), ("9e0", "9"), ("18/2", "9"), ("4+5", "9"), ("8 or 9", "9"),
        ("8, 9", "9"), ("8,9", "89"), ("1,00", "100"), ("10,00,000", "1000000"), ("\u0669", "9"),
        ("\uff19", "9"), ("nan", "9"), ("inf", "inf2"), ("New York", "new york"),
        ("newyork", "new york"), ("9007199254740993", "9007199254740992"),
        ("0.30000000000000004", "0.3"), ("0,009", "9"), ("000,009", "9"),
    ],
)  # fmt: skip
def test_wrong_answers(found, right):
    assert answer_reward(completion(found), right) == 0


QUESTION = "What is 4 + 5? Answer as <think>...</think><answer>...</answer>."
HACKS = {
    "nothing": "",
    "the bare answer": "9",
    "answer without thought": "<answer>9</answer>",
    "answer in the thought only": "<think>The answer is 9.</think>",
    "answer in the thought, another in the answer": completion("7", thought="It is 9."),
    "empty box": completion(""),
    "blank box": completion(" \n\t"),
    "two answer blocks": completion("9") + "<answer>8</answer>",
    "two answer blocks, right one last": completion("8") + "<answer>9</answer>",
    "the same answer twice": completion("9") * 2,
    "every digit in one box": completion("0 1 2 3 4 5 6 7 8 9"),
    "answer block inside the thought": "<think><answer>9</answer></think><answer>8</answer>",
    "answer block inside the thought, right one outside": (
        "<think><answer>8</answer></think><answer>9</answer>"
    ),
    "nested answer": completion("<answer>9</answer>"),
    "nested thought": completion("9", thought="<think>9</think>"),
    "a thought inside the answer": completion("<think>hm</think>9"),
    "unclosed answer": "<think>4 and 5</think><answer>9",
    "unclosed thought": "<think>4 and 5<answer>9</answer>",
    "unopened answer": "<think>4 and 5</think>9</answer>",
    "answer before thought": "<answer>9</answer><think>4 and 5</think>",
    "text before": "Sure! " + completion("9"),
    "text between": "<think>4 and 5</think> so <answer>9</answer>",
    "text after": completion("9") + " I hope this helps.",
    "the question again": QUESTION,
    "the question again, then the answer": QUESTION + completion("9"),
    "the template itself": completion("...", thought="..."),
    "tags in capitals": completion("9").upper(),
    "tags with spaces": "< think >4 and 5</ think >< answer >9</ answer >",
}


@pytest.mark.parametrize("hack", HACKS)
def test_hacks_earn_no_answer_reward(hack):
    assert answer_reward(HACKS[hack], "9") == 0


WELL_FORMED_HACKS = {
    "answer in the thought, another in the answer",
    "empty box",
    "blank box",
    "every digit in one box",
    "the template itself",
}


@pytest.mark.parametrize("hack", sorted(HACKS.keys() - WELL_FORMED_HACKS))
def test_hacks_earn_no_format_reward(hack):
    """The five left out are in the format: they earn its small reward, and no more."""
    assert format_reward(HACKS[hack]) == 0


def test_an_empty_right_answer_is_never_matched():
    assert answer_reward(completion(""), "") == 0


def test_format_does_not_read_the_answer():
    assert format_reward(completion("9")) == format_reward(completion("8")) == 1


def test_a_very_long_number_is_only_compared():
    """Python refuses to parse integers of more than 4,300 digits; a completion must not be able to
    raise.
    """
    digits = "9" * 10_000
    assert answer_reward(completion(digits), digits + ".0") == 1
    assert answer_reward(completion(digits), "9") == 0


def test_normalise():
    assert normalise(" 1,000.50 ") == Decimal("1000.5")
    assert normalise(" two  words ") == "two words"


def test_the_total_weighs_the_named_rewards():
    total, by_name = total_reward(completion("9"), "9", {"answer": 1.0, "format": 0.1})
    assert total == pytest.approx(1.1) and by_name == {"answer": 1.0, "format": 1.0}
    total, by_name = total_reward(completion("8"), "9", {"answer": 1.0, "format": 0.1})
    assert total == pytest.approx(0.1) and by_name == {"answer": 0.0, "format": 1.0}
    assert total_reward(completion("9"), "9", {"format": 0.5}) == (0.5, {"format": 1.0})


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_number_for_any_text(name):
    """A completion must not be able to raise, whatever it says, and an answer neither."""
    texts = [*HACKS.values(), completion("9"), completion("nan"), "\x00", "\ud800"]
    for text, answer in itertools.product(texts, ("9", "", "New York")):
        reward = REWARDS[name](text, answer)
        assert isinstance(reward, float) and math.isfinite(reward)
        assert total_reward(text, answer, {name: 2.0}) == (2 * reward, {name: reward})


@pytest.mark.parametrize(
    "found", ["0" * 10**6 + "9", "0,000," * 160_000 + "009", "9." + "0" * 10**6, "9" + " " * 10**6,
              "9\x00" * 10**6, "1,000" * 200_000, "</think><answer>" * 60_000 + "9"],
)  # fmt: skip
def test_a_million_characters_are_neither_paid_nor_waited_for(found):
    text = completion(found + "|") if found.endswith(" ") else completion(found)
    began = time.perf_counter()
    assert answer_reward(text, "9") == 0
    assert time.perf_counter() - began < 1


def test_a_right_answer_of_a_million_characters_is_paid_in_no_time():
    """What is compared is as long as the right answer is, whoever wrote that."""
    for right in ("7" * 10**6, "1," * 500_000, "1" + ",000" * 250_000, "ab " * 300_000 + "."):
        began = time.perf_counter()
        assert answer_reward(completion(right), right) == 1
        assert answer_reward(completion(right[:-1] + "8"), right) == 0
        assert time.perf_counter() - began < 2
