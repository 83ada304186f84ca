"""Right answers are paid, and nothing else is: not another answer, and not a hack."""

import itertools
import math
import time
from decimal import Decimal

import pytest

from data.tasks.problem import Problem
from errors import UserError
from rl.rewards import REWARDS, check_weights, get_reward, metric_name, total_reward
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
    nine = Problem("4 + 5?", "9")
    total, by_name = total_reward(completion("9"), nine, {"answer": 1.0, "format": 0.1})
    assert total == pytest.approx(1.1) and by_name == {"answer": 1.0, "format": 1.0}
    total, by_name = total_reward(completion("8"), nine, {"answer": 1.0, "format": 0.1})
    assert total == pytest.approx(0.1) and by_name == {"answer": 0.0, "format": 1.0}
    assert total_reward(completion("9"), nine, {"format": 0.5}) == (0.5, {"format": 1.0})


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_number_for_any_text(name):
    """A completion must not be able to raise, whatever it says, and an answer neither."""
    texts = [*HACKS.values(), completion("9"), completion("nan"), "\x00", "\ud800"]
    for text, answer in itertools.product(texts, ("9", "", "New York")):
        problem = Problem("4 + 5?", answer)
        reward = REWARDS[name](text, problem)
        assert isinstance(reward, float) and math.isfinite(reward)
        assert total_reward(text, problem, {name: 2.0}) == (2 * reward, {name: reward})


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


OWN = """
def brevity(text, problem):
    return max(0, 1 - len(text) / 10)

def knows(text, problem):
    return problem.data["unit"] in text

def fails(text, problem):
    return 1 / len(text)

def odd(text, problem):
    return problem.data["value"]

constant = 1.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    get_reward.cache_clear()
    return "own.py"


def test_a_function_of_ones_own_is_a_reward_and_keeps_its_fractions(own):
    problem = Problem("How far?", "9", data={"unit": "km"})
    weights = {"answer": 1.0, f"{own}:brevity": 0.5, f"{own}:knows": 2.0}
    total, by_name = total_reward("9 km...", problem, weights)
    assert by_name == {"answer": 0.0, f"{own}:brevity": pytest.approx(0.3), f"{own}:knows": 1.0}
    assert total == pytest.approx(2.15)
    assert [metric_name(name) for name in weights] == [
        "rewards/answer", "rewards/brevity", "rewards/knows",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", [1.0], {"a": 1}])
def test_what_is_no_finite_number_is_one_line_that_names_reward_and_problem(own, value):
    problem = Problem("How far?", "9", id="far.jsonl:7", data={"value": value})
    with pytest.raises(UserError, match=r"own.py:odd: returned .* for problem far.jsonl:7; a rew"):
        get_reward(f"{own}:odd")("", problem)


def test_a_reward_that_raises_is_one_line_with_its_place(own):
    problem = Problem("How far?", "9", id="far.jsonl:7")
    message = r"own.py:9: ZeroDivisionError: .* \(reward own.py:fails, problem far.jsonl:7\)"
    with pytest.raises(UserError, match=message):
        get_reward(f"{own}:fails")("", problem)


@pytest.mark.parametrize(
    "text, name, message",
    [
        (OWN, "own.py:brevty", "own.py: defines no 'brevty' .did you mean 'brevity'"),
        (OWN, "own.py:constant", "own.py:constant: is a float, not a function"),
        (OWN, "other.py:brevity", "other.py: no such file .looked from"),
        ("def brevity(:\n", "own.py:brevity", "own.py:1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "own.py:brevity", "own.py:2: SystemExit: 3"),
        ("x = 1\nimport nowhere_at_all\n", "own.py:brevity", "own.py:2: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, monkeypatch, text, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(text)
    get_reward.cache_clear()
    with pytest.raises(UserError, match=message) as caught:
        get_reward(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({}, "must name at least one reward"),
        ({"anwser": 1.0}, "no reward 'anwser' (did you mean 'answer'?"),
        ({"own.py": 1.0}, "no reward 'own.py' (there are answer, format"),
        ({"own.txt:f": 1.0}, "no reward 'own.txt:f'"),
        ({"answer": math.nan}, "the weight of 'answer' = nan: must be finite"),
        ({"a.py:f": 1.0, "b.py:f": 1.0}, "two rewards would be 'rewards/f' in the metrics"),
    ],
)
def test_wrong_weights_name_the_field(weights, message):
    with pytest.raises(UserError) as caught:
        check_weights(weights)
    assert str(caught.value).startswith("reinforce.rewards") and message in str(caught.value)


def test_a_file_is_run_once(tmp_path, monkeypatch):
    """By whatever name it goes, for a reward, for two, and for tasks beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once.py").write_text(
        "with open('runs', 'a') as runs:\n    runs.write('.')\n"
        "one = lambda text, problem: 1\ntwo = lambda text, problem: 2\n"
    )
    get_reward.cache_clear()
    problem = Problem("?", "")
    names = ("once.py:one", "once.py:two", f"{tmp_path}/once.py:one")
    assert [get_reward(name)("", problem) for name in names] == [1, 2, 1]
    assert (tmp_path / "runs").read_text() == "."
