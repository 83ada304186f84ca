"""Completions are kept by step, and those that a resumed run writes again are dropped."""

import dataclasses
import json

import numpy as np

from data.tasks.problem import Problem
from data.tokenizer_training import bytes_tokenizer
from report.results import read_run
from rl.generate import Completion
from rl.pay import Rewards
from rl.rollouts import Group
from rl.spans import spans_of
from rl.traces import Traces
from rl.trajectory_file import read_trajectories
from tests.trajectories import completion, trajectory

PROBLEMS = [Problem("What is 1 + 1?", "2"), Problem("What is 1 + 2?", "3")]
TOKENIZER = bytes_tokenizer()


def paid_by(name: str, totals: list[float]) -> Rewards:
    return Rewards((name,), np.ones(1, np.float32), np.asarray([[totals]], np.float32))


def steps(workdir) -> list[int]:
    lines = (workdir / "traces.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def write(workdir, resume_step: int, *numbers: int, kept: int = 2) -> None:
    """Two completions of each problem, in each step."""
    completions = [completion(text) for text in ("a\n", "b", "c", "d")]
    paid = paid_by("x", [1.0, 0.1]), paid_by("x", [0.0, 0.5])
    groups = [
        Group(PROBLEMS[0], completions[:2], paid[0]),
        Group(PROBLEMS[1], completions[2:], paid[1]),
    ]
    with Traces(workdir, kept, TOKENIZER, resume_step) as traces:
        for step in numbers:
            traces.write(step, groups)


def test_the_first_completions_of_a_step_are_kept(tmp_path):
    expected = [("a\n", "2", 1.0), ("b", "2", 0.1), ("c", "3", 0.0), ("d", "3", 0.5)]
    for kept, count in ((2, 2), (3, 3), (-1, 4), (9, 4), (0, 0)):
        write(tmp_path, 0, 1, kept=kept)
        run = read_run(tmp_path, lambda _: None)
        found = [(each["completion"], each["answer"], each["reward"]) for each in run.traces]
        assert found == expected[:count]
        assert all(each["step"] == 1 for each in run.traces) and run.notes == []


def test_a_line_has_the_tokens_and_what_they_are_for(tmp_path):
    """And is read again as the trajectory that it was."""
    prompt, text = "2?", "<think>hm</think>2"
    made = trajectory(TOKENIZER.encode(prompt), TOKENIZER.encode(text))
    made = dataclasses.replace(made, spans=spans_of(made, TOKENIZER))
    with Traces(tmp_path, 2, TOKENIZER, 0) as traces:
        traces.write(1, [Group(PROBLEMS[0], [Completion(made, text)], paid_by("x", [1.0]))])
    ((found, more),) = read_trajectories(tmp_path / "traces.jsonl")
    assert found.tokens_T.tolist() == made.tokens_T.tolist() and found.spans == made.spans
    assert more["completion"] == text and more["prompt"] == PROBLEMS[0].question
    assert more["parts"] == [
        {"part": "prompt", "text": "2?"},
        {"part": "thought", "text": "<think>hm</think>"},
        {"part": "model", "text": "2"},
    ]


def test_a_resumed_run_has_each_step_once(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    with (tmp_path / "traces.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')
    write(tmp_path, 2, 3)
    assert steps(tmp_path) == [1, 1, 2, 2, 3, 3]
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [1, 1]
