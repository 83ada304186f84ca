"""A problem's line says what its completions came to, and figures follow from such lines alone."""

import json

import numpy as np
import pytest

from data.tasks.problem import Problem
from rl.config import EvaluateConfig
from rl.generate import Completion
from rl.problem_outcomes import Outcome, answer_classes, figures
from tests.trajectories import completion, trajectory


def written(answer: str) -> str:
    return f"<think>well</think><answer>{answer}</answer>"


def test_answers_are_classes_as_the_reward_compares_them():
    """Numbers by value and texts by their words; an answer within the thought is none."""
    texts = [
        written("9"),
        written(" 9.0 "),
        written("1,000"),
        written("a  b"),
        "<think>9</think>",
        written("a b"),
        written("+1000"),
        "<think><answer>9</answer></think>",
        written(""),
    ]
    classes, answers = answer_classes(texts)
    assert classes == [0, 0, 1, 2, -1, 2, 1, -1, -1]
    assert answers == ["9", "1,000", "a  b"]


def completions(*texts: str) -> list[Completion]:
    made = trajectory([5, 6], [7, 8])
    return [Completion(made, text) for text in texts]


def outcome(rewards=(1.0, 0.0, 1.0, 0.0), **changes) -> Outcome:
    texts = [written("3"), written("4"), written("3.0"), "nothing"]
    problem = Problem("1 + 2?", "3", **changes)
    return Outcome.of(problem, completions(*texts), rewards, success=1.0, temperature=0.6)


def test_a_line_says_what_a_person_looks_for_and_reads_again():
    record = json.loads(json.dumps(outcome(ops=2).as_record()))
    shown = {
        "temperature": 0.6,
        "difficulty": 2,
        "samples": 4,
        "solved": 2,
        "pass_rate": 0.5,
        "majority_answer": "3",
        "majority_votes": 2,
        "majority_correct": 1.0,
        "no_answer": 1,
        "prompt_tokens": [5, 6],
        "correct": [1, 0, 1, 0],
        "classes": [0, 1, 0, -1],
    }
    assert {name: record[name] for name in shown} == shown
    assert record["pass_rate_low"] < 0.5 < record["pass_rate_high"]
    assert Outcome.from_record(record).as_record() == outcome(ops=2).as_record()
    with pytest.raises(ValueError, match="not of one length"):
        Outcome.from_record(record | {"classes": [0]})
    with pytest.raises(KeyError):
        Outcome.from_record({"id": "x"})


def test_figures_worked_by_hand():
    """Two problems of two difficulties: half right with a majority of 2 of 3 votes, and none."""
    lines = [outcome(ops=1), outcome(rewards=(0.0, 0.5, 0.0, 0.5), ops=2)]
    found = figures(lines, EvaluateConfig(samples=4, ks=(1, 4), bootstrap=50))
    assert [row["k"] for row in found["pass_at_k"]] == [1, 4]
    assert found["pass_at_k"][0]["mean"] == 0.25 and found["pass_at_k"][1]["mean"] == 0.5
    assert found["cons_at_k"][1]["mean"] == 0.5 and found["no_answer"] == 0.25
    assert found["mean_at_n"]["mean"] == pytest.approx((0.5 + 0.25) / 2)
    assert [(g["difficulty"], g["pass@1"]["mean"]) for g in found["by_difficulty"]] == [
        ("1", 0.5),
        ("2", 0.0),
    ]
    assert [g["cons@4"]["mean"] for g in found["by_difficulty"]] == [1.0, 0.0]


def test_one_vote_is_one_try():
    """cons@1 is pass@1, whatever the answers; and without ks they are powers of two."""
    rng = np.random.default_rng(0)
    lines = [outcome(rewards=rng.integers(0, 2, 4).tolist()) for _ in range(5)]
    lines = [line for line in lines if line.correct[3] == 0]  # which has no answer
    found = figures(lines, EvaluateConfig(samples=4, bootstrap=20))
    assert found["cons_at_k"][0] == pytest.approx(found["pass_at_k"][0])
    assert [row["k"] for row in found["cons_at_k"]] == [1, 2, 4]
    assert found["by_difficulty"] == []


def test_a_cut_completion_is_counted():
    made = [completion("x", cut=cut) for cut in (False, True)]
    line = Outcome.of(Problem("q", "a"), made, [0.0, 0.0], success=1.0, temperature=1.0)
    assert line.truncated == [0, 1] and line.as_record()["cut"] == 1
    assert line.as_record()["majority_answer"] is None
