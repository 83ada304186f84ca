"""Completions are kept by step, and those that a resumed run writes again are dropped."""

import json

from data.tasks.problem import Problem
from report.results import read_run
from rl.traces import COMPLETIONS, Traces
from tests.trajectories import completion

PROBLEM = Problem("What is 1 + 1?", "2")


def steps(workdir) -> list[int]:
    lines = (workdir / "traces.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def write(workdir, resume_step: int, *numbers: int) -> None:
    completions = [completion(text) for text in ("a\n", "b", "c")]
    with Traces(workdir, resume_step) as traces:
        for step in numbers:
            traces.write(step, PROBLEM, completions, [1.0, 0.1, 0.0])


def test_the_first_completions_of_a_problem_are_kept(tmp_path):
    write(tmp_path, 0, 1)
    run = read_run(tmp_path, lambda _: None)
    assert [trace["completion"] for trace in run.traces] == ["a\n", "b"][:COMPLETIONS]
    assert run.traces[0] == {
        "step": 1,
        "prompt": "What is 1 + 1?",
        "completion": "a\n",
        "answer": "2",
        "reward": 1.0,
    }
    assert run.notes == []


def test_a_resumed_run_has_each_step_once(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    with (tmp_path / "traces.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')
    write(tmp_path, 2, 3)
    assert steps(tmp_path) == [1, 1, 2, 2, 3, 3]
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [1, 1]
