"""Tasks of a person's own file: known by name everywhere, and every fault of theirs one line."""

from pathlib import Path

import pytest

from data.documents import select_split
from data.sources import open_source
from data.tasks import spec as specs
from data.tasks.draw import draw_problems, training_problems
from data.tasks.spec import parse_task, register_tasks
from errors import UserError

HEAD = """
from __future__ import annotations
from dataclasses import dataclass
from data.tasks.problem import Problem
"""
FILE = (
    HEAD
    + """
@dataclass
class Reverse:
    name = "reverse"
    longest: int = 6
    shout: bool = False

    def problem(self, rng):
        word = "".join(rng.choices("abc", k=rng.randint(2, self.longest)))
        word = word.upper() if self.shout else word
        return Problem(f"Write {word} backwards.", word[::-1], data={"word": word})

class Capitals:
    name = "capitals"
    cities = [("France", "Paris"), ("Peru", "Lima"), ("Japan", "Tokyo")]
    def __len__(self):
        return 2
    def __getitem__(self, index):
        country, city = self.cities[index]
        return Problem(f"The capital of {country}?", city)
    @property
    def held_out(self):
        return [Problem("The capital of Japan?", "Tokyo")]
"""
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "OWN_TASKS", {})


def register(text: str) -> None:
    Path("mine.py").write_text(text)
    register_tasks("mine.py")


def test_a_class_that_generates_is_a_task_like_any():
    register(FILE)
    problems = training_problems("task:reverse?longest=3&shout=true", 4_096, seed=0)
    assert 20 < len(problems) < 36 and all(p.answer == p.data["word"][::-1] for p in problems)
    assert all(problem.data["word"].isupper() for problem in problems)
    assert problems == training_problems("task:reverse?longest=3&shout=1", 4_096, seed=0)
    source = open_source("task:reverse?longest=3&style=chat", 1_000)
    bodies = [document.body for document in select_split(source, "train", 0.0)]
    trained = {body[0]["content"] for body in bodies if isinstance(body, list)}
    assert len(source) == 36
    assert trained == {p.question for p in training_problems("task:reverse?longest=3", 99, seed=0)}


def test_a_class_that_is_a_list_holds_out_its_own():
    register(FILE)
    train = {problem.answer for problem in training_problems("task:capitals", 4_096, seed=0)}
    (held,) = draw_problems("task:capitals", "validation", 100, seed=0)
    assert train == {"Paris", "Lima"} and held.answer == "Tokyo"


def test_registering_again_is_no_trouble():
    register(FILE)
    register_tasks("mine.py")
    register_tasks(str(Path("mine.py").resolve()))
    assert set(specs.OWN_TASKS) == {"reverse", "capitals"}


def body(lines: str) -> str:
    return f"{HEAD}\nclass Mine:\n    name = 'mine'\n    def problem(self, rng):\n        {lines}\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1\n", "mine.py: defines no task: a class with a name, and problem(rng)"),
        (
            "class A:\n    def problem(self, rng): ...\n",
            "mine.py: class A has problems and no name",
        ),
        (
            "class A:\n    name = 'a b'\n    def problem(self, rng): ...\n",
            "has problems and no name",
        ),
        (FILE.replace("capitals", "reverse"), "mine.py: two tasks are named 'reverse'"),
        (FILE.replace("capitals", "arithmetic"), "there is a task 'arithmetic' already"),
        (FILE.replace("capitals", "jsonl"), "there is a task 'jsonl' already"),
        ("import nothing_of_that_name\n", "mine.py:1: ModuleNotFoundError"),
        ("def f(:\n", "mine.py:1: SyntaxError"),
        (body("return 1 / 0"), 'mine.py:9: ZeroDivisionError: division by zero (of "task:mine")'),
        (body("return 'What?'"), 'mine.py: "task:mine" gave a str, not a data.tasks.problem.Prob'),
        (body("return Problem('What?', 3)"), "gave a problem whose question or answer is no text"),
        (body("return Problem('', '3')"), "gave a problem whose question or answer is no text"),
        (body("raise SystemExit(4)"), "mine.py:9: SystemExit: 4"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line(text, words):
    with pytest.raises(UserError) as error:
        register(text)
        draw_problems("task:mine", "train", 10, seed=0)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        (
            "task:revers",
            "names no task; write task:NAME?PARAMETERS with NAME one of arithmetic, r",
        ),
        ("task:reverse?longst=3", "no parameter 'longst'; did you mean longest?"),
        ("task:reverse?longest=x", "longest = x: is not of type int"),
        ("task:reverse?shout=maybe", "shout = maybe: is not of type bool"),
        ("task:reverse?longest=1", "mine.py:13: ValueError"),
        ("task:capitals?style=rhyme", "style = rhyme"),
    ],
)
def test_a_wrong_source_is_one_line(spec, words):
    register(FILE)
    with pytest.raises(UserError) as error:
        draw_problems(spec, "train", 10, seed=0)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_task_that_is_not_registered_says_how():
    with pytest.raises(UserError, match=r"of your own needs --config.tasks=FILE.py"):
        parse_task("task:reverse")
    with pytest.raises(UserError, match=r"none.py: no such file"):
        register_tasks("none.py")
    with pytest.raises(UserError, match=r"mine.txt: must be a Python file"):
        register_tasks("mine.txt")
