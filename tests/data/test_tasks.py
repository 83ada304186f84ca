"""Tasks: problems are right, distinct, split by their question, and written as documents."""

import itertools
import random
import re
from typing import Any

import pytest

from data.documents import Split, select_split
from data.sources import open_source
from data.tasks.arithmetic import Arithmetic, Step, apply
from data.tasks.documents import as_messages, as_text
from data.tasks.draw import VALIDATION_SHARE, draw_problems, training_problems
from data.tasks.spec import parse_task
from errors import UserError

SPLITS: tuple[Split, ...] = ("train", "validation")


def read_trace(trace: str) -> list[Step]:
    """Parses a trace."""
    matches = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", text) for text in trace.split(";")]
    assert None not in matches
    return [Step(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m]


def bodies(spec: str, *, chat: bool = False) -> list[Any]:
    """Returns the bodies of all documents of a task."""
    source = open_source(spec, 1000, chat=chat)
    return [source[index].body for index in range(len(source))]


PARAMETERS = [
    {},
    {"min_ops": 1, "max_ops": 6, "max_value": 99, "multiply": 1},
    {"max_value": 4},
    {"distractors": 2, "contexts": 1},
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_traces_are_right_and_within_the_parameters(parameters):
    task = Arithmetic(**parameters)
    for index in range(500):
        problem = task.problem(random.Random(str(index)))
        steps = read_trace(problem.trace)
        assert all(apply(step.left, step.operator, step.right) == step.result for step in steps)
        assert all(before.result == after.left for before, after in itertools.pairwise(steps))
        assert problem.answer == str(steps[-1].result)
        assert problem.ops == len(steps) and task.min_ops <= problem.ops <= task.max_ops
        assert all(
            0 <= number <= task.max_value
            for step in steps
            for number in (step.left, step.right, step.result)
        )


@pytest.mark.parametrize("parameters", PARAMETERS[:3])
def test_question_asks_what_the_trace_works_out(parameters):
    """The numbers of the question are, in order, the start and the operands of the trace."""
    for index in range(300):
        problem = Arithmetic(**parameters).problem(random.Random(str(index)))
        question = problem.question.replace("doubles", "2").replace("triples", "3")
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        steps = read_trace(problem.trace)
        assert numbers == [steps[0].left, *(step.right for step in steps)]


def test_all_kinds_of_steps_appear():
    seen = {
        step.operator
        for index in range(100)
        for step in read_trace(Arithmetic(multiply=1).problem(random.Random(str(index))).trace)
    }
    assert seen == {"+", "-", "*"}


def test_problems_are_distinct_and_held_out():
    """No question is in both, whatever the seed and the parameters: its hash alone decides."""
    train = [
        *draw_problems("task:arithmetic", "train", 2000, seed=0),
        *draw_problems("task:arithmetic?max_ops=2&style=chat", "train", 500, seed=7),
    ]
    validation = [
        *draw_problems("task:arithmetic", "validation", 200, seed=0),
        *draw_problems("task:arithmetic?max_ops=2", "validation", 200, seed=9),
    ]
    train_questions = [problem.question for problem in train]
    assert not set(train_questions) & {problem.question for problem in validation}
    assert len(set(train_questions[:2000])) == 2000


def test_documents_and_drawn_problems_agree_on_the_split():
    """No question that a document trains on is drawn to evaluate."""
    task = "task:arithmetic?min_ops=1&max_ops=1&contexts=2"  # few questions, so that both meet them
    documents = select_split(open_source(f"{task}&count=1000", 1000), "train", 0.0)
    train_texts = {str(document.body) for document in documents}
    drawn = {
        split: {as_text(problem) for problem in draw_problems(task, split, 100, seed=0)}
        for split in ("train", "validation")
    }
    assert train_texts & drawn["train"] and not train_texts & drawn["validation"]


def test_the_seed_decides_the_problems():
    """A greater count only appends to them."""

    def draw(count: int, seed: int):
        return draw_problems("task:arithmetic", "train", count, seed=seed)

    assert draw(50, seed=1) == draw(50, seed=1) == draw(100, seed=1)[:50]
    assert draw(50, seed=1) != draw(50, seed=2)


def test_a_source_has_as_many_documents_as_its_count():
    source = open_source("task:arithmetic?count=700", 1000)
    assert len(source) == 700 == len({source.key(index) for index in range(700)})
    assert source.validation_share == VALIDATION_SHARE


def test_a_problem_is_a_text_or_a_conversation():
    problem = Arithmetic().problem(random.Random("0"))
    text = f"Question: {problem.question}\nThought: {problem.trace}\nAnswer: {problem.answer}\n"
    assert as_text(problem) == text
    assert bodies("task:arithmetic?count=5")[3].startswith("Question: ")
    key = open_source("task:arithmetic?count=5", 1000).key(3)
    for chats in (
        bodies("task:arithmetic?count=5&style=chat"),
        bodies("task:arithmetic?count=5", chat=True),
    ):
        question, solution = chats[3]
        assert question == {"role": "user", "content": key}
        assert re.fullmatch(r"<think>.*</think><answer>\d+</answer>", solution["content"])
    assert as_messages(problem)[1]["role"] == "assistant"


def test_direct_is_the_share_without_a_thought():
    """Such documents state the right answer, and they are the same ones in either style."""
    text, chat, whole = (
        bodies(f"task:arithmetic?count=1000&direct={share}{style}")
        for share, style in ((0.3, ""), (0.3, "&style=chat"), (0, ""))
    )
    direct = ["Thought: " not in body for body in text]
    assert 240 < sum(direct) < 360  # 300, within four standard deviations (14.5)
    assert direct == [messages[1]["content"].startswith("<think></think>") for messages in chat]
    answers = [[body.split("Answer: ")[1] for body in texts] for texts in (text, whole)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("task:arithmetics", "names no task"),
        ("task:arithmetic?min_op=2", "no parameter 'min_op'; did you mean min_ops?"),
        ("task:arithmetic?min_ops=two", "min_ops = two: is not of type int"),
        ("task:arithmetic?min_ops=3&max_ops=2", "must be 1 <= min_ops <= max_ops"),
        ("task:arithmetic?max_value=3", "max_value = 3: must be at least 4"),
        ("task:arithmetic?contexts=99", "contexts = 99"),
        ("task:arithmetic?direct=1.5", "direct = 1.5: must be between 0 and 1"),
        ("task:arithmetic?style=rhyme", "style = rhyme"),
        ("task:arithmetic?count=1000000000000", "count = 1000000000000: must be 0 (all) to"),
        ("task:arithmetic?count=-1", "count = -1: must be 0 (all) to"),
        ("task:arithmetic?min_ops=1000000&max_ops=1000000", "<= max_ops <= 1000"),
        ("task:arithmetic?max_value=" + "9" * 30, "at most 10^9"),
        ("task:arithmetic?max_value=" + "9" * 5000, "is not of type int"),
    ],
)
def test_bad_parameters_are_named(spec, words):
    with pytest.raises(UserError) as error:
        parse_task(spec)
    assert words in str(error.value)
    assert spec[:100] in str(error.value)


def test_a_task_of_few_problems_has_those():
    """They are drawn as far as they go; a source is asked for a number on purpose."""
    few = "task:arithmetic?max_value=4&max_ops=1&min_ops=1&contexts=1"
    train, validation = (draw_problems(few, split, 1000, seed=0) for split in SPLITS)
    assert 20 < len(train) < 1000 and 0 < len(validation) < 100
    assert len(train) == len({problem.question for problem in train})
    assert len(open_source(few, 1000)) == len(train) + len(validation)
    assert len(training_problems(few, 10, seed=0)) == 10
    with pytest.raises(UserError, match=r"lower count = 5000"):
        open_source(f"{few}&count=5000", 1000)
