"""Problems from files: any number, split by hash or by file, and every fault one line."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.documents import Split, select_split
from data.sources import open_source
from data.tasks import files
from data.tasks.documents import as_messages
from data.tasks.draw import draw_problems, training_problems
from data.tasks.problem import ListedTask, Problem
from data.tasks.spec import parse_task
from errors import UserError

SPLITS: tuple[Split, ...] = ("train", "validation")


def problems_of(spec: str) -> list[Problem]:
    task, _ = parse_task(spec)
    assert isinstance(task, ListedTask)
    return [task[index] for index in range(len(task))]


RECORDS = [{"question": f"What is {n} + 1?", "answer": n + 1, "level": n % 3} for n in range(50)]
TASK = "task:jsonl:sums.jsonl#question,answer"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.read_task.cache_clear()


def write(name: str, records: list) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def questions(spec: str, split: Split, count: int = 1_000) -> list[str]:
    return [problem.question for problem in draw_problems(spec, split, count, seed=0)]


def test_a_record_is_a_problem_with_all_its_fields():
    write("sums.jsonl", RECORDS)
    by_question = {problem.question: problem for problem in training_problems(TASK, 10, seed=0)}
    assert len(by_question) > 10, "all of a file, whatever a generated task would give"
    question, problem = next(iter(by_question.items()))
    number = int(question.split()[2])
    assert problem.answer == str(number + 1) and problem.data["level"] == number % 3
    assert problem.messages == [{"role": "user", "content": question}]
    assert problem.id == f"sums.jsonl:{number + 1}", "the line, as people count"


def test_the_hash_of_its_question_holds_out_a_tenth():
    write("sums.jsonl", RECORDS)
    train, validation = (questions(TASK, split) for split in SPLITS)
    assert sorted(train + validation) == sorted(record["question"] for record in RECORDS)
    write("sums.jsonl", RECORDS[::-1])
    assert set(questions(TASK, "validation")) == set(validation), "whatever the order of the file"
    assert 0 < len(validation) < 15
    assert questions(TASK, "train", 5) == train[:5], "a greater count only appends"


def test_a_file_of_its_own_is_held_out_and_never_trained_on():
    write("sums.jsonl", RECORDS)
    write(
        "held.jsonl", [{"question": "What is 7 + 1?", "answer": 8}, {"question": "?", "answer": 0}]
    )
    spec = f"{TASK}?validation=held.jsonl"
    assert set(questions(spec, "validation")) == {"What is 7 + 1?", "?"}
    assert len(questions(spec, "train")) == 49 and "What is 7 + 1?" not in questions(spec, "train")
    source = open_source(f"{spec}&style=chat&count=10", 1_000)
    train, validation = (select_split(source, split, 0.0) for split in SPLITS)
    assert len(train) == 10 and len(validation) == 2, "count leaves what is held out"
    bodies = [document.body for document in validation]
    asked = {body[0]["content"] for body in bodies if isinstance(body, list)}
    assert asked == {"What is 7 + 1?", "?"}


def test_documents_and_problems_agree_on_the_split():
    write("sums.jsonl", RECORDS)
    source = open_source(TASK, 1_000)
    assert len(source) == 50
    for split in SPLITS:
        texts = {str(document.body) for document in select_split(source, split, 0.5)}
        asked = {re.findall("Question: (.*)\n", text)[0] for text in texts}
        assert asked == set(questions(TASK, split))


def test_the_formats_have_the_same_problems():
    """Plain, compressed, with the mark of UTF-8, and columns; several files by a pattern."""
    write("sums.jsonl", RECORDS)
    plain = Path("sums.jsonl").read_bytes()
    Path("zipped.jsonl.gz").write_bytes(gzip.compress(plain))
    Path("marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n\r\n"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), "sums.parquet")
    write("part1.jsonl", RECORDS[:20])
    write("part2.jsonl", RECORDS[20:])
    write("odd[1].jsonl", RECORDS)
    expected = sorted(questions(TASK, "train"))
    for place in ("zipped.jsonl.gz", "marked.jsonl", "part*.jsonl", "odd[1].jsonl"):
        assert sorted(questions(f"task:jsonl:{place}#question,answer", "train")) == expected, place
    assert sorted(questions("task:parquet:sums.parquet#question,answer", "train")) == expected
    (problem, *_) = draw_problems("task:parquet:sums.parquet#question,answer", "train", 1, seed=0)
    assert problem.data["level"] in (0, 1, 2)


def test_what_stands_before_the_mark_is_the_way_to_the_answer():
    """As in GSM8K: fine-tuning shows it, and rewards compare what stands behind."""
    write("g.jsonl", [{"q": "How many?", "a": "2 + 3 = 5 #### no\nSo 5.\n#### 1,005"}])
    (problem,) = problems_of("task:jsonl:g.jsonl#q,a?answer_after=####")
    assert problem.answer == "1,005" and problem.trace == "2 + 3 = 5 #### no\nSo 5."
    assert as_messages(problem)[-1]["content"].startswith("<think>2 + 3 = 5")
    assert problem.data["a"].endswith("#### 1,005")


def test_a_question_may_be_a_conversation():
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 x 7?"}]
    write("chat.jsonl", [{"prompt": asked, "gold": 42}, {"prompt": asked[1:], "gold": 42}])
    first, second = problems_of("task:jsonl:chat.jsonl#prompt,gold")
    assert first.messages == asked and second.question == "6 x 7?"
    assert as_messages(first) == [
        *asked, {"role": "assistant", "content": "<think></think><answer>42</answer>"},
    ]  # fmt: skip


def test_a_problem_may_have_no_answer():
    write("open.jsonl", [{"question": "Write a haiku.", "n": n} for n in range(3)])
    problems = problems_of("task:jsonl:open.jsonl#question")
    assert [problem.answer for problem in problems] == ["", "", ""]


def test_a_lone_surrogate_is_no_trouble():
    Path("s.jsonl").write_text('{"question": "\\ud83d?", "answer": "\\udc00"}\n')
    (problem,) = problems_of("task:jsonl:s.jsonl#question,answer")
    assert (problem.question, problem.answer) == ("\ufffd?", "\ufffd")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"question": "a"}', 'sums.jsonl:51: no field "answer" (has: "question")'),
        ('{"answer": "a"}', 'sums.jsonl:51: no field "question"'),
        ('{"question": "a", "answer": null}', 'field "answer" is null, neither a text nor'),
        ('{"question": "a", "answer": true}', 'field "answer" is true, neither a text nor'),
        ('{"question": "a", "answer": [1]}', 'field "answer" is [1], neither a text nor'),
        ('{"question": "a", "answer": " "}', 'field "answer" has an empty answer'),
        ('{"question": "", "answer": "1"}', 'field "question" is "", neither a text nor a list'),
        ('{"question": 3, "answer": "1"}', 'field "question" is 3, neither a text nor a list'),
        ('{"question": [], "answer": "1"}', 'field "question" is []'),
        (
            '{"question": [{"role": "assistant", "content": "x"}], "answer": "1"}',
            "that ends with the user's",
        ),
        ("[1, 2]", "sums.jsonl:51: a JSON list, not an object"),
        ('{"question": "a", ', "sums.jsonl:51: not JSON"),
        ("[" * 100_000, "sums.jsonl:51: not JSON"),
        ('{"question": "\udcff", "answer": "1"}', "sums.jsonl:51: not UTF-8"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(line, words):
    write("sums.jsonl", RECORDS)
    with Path("sums.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError) as error:
        parse_task(TASK)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("task:jsonl:no.jsonl#question,answer", "no file matches no.jsonl (looked from"),
        ("task:jsonl:sums.jsonl", "write task:jsonl:FILE#QUESTION,ANSWER"),
        ("task:jsonl:#question,answer", "write task:jsonl:FILE#QUESTION,ANSWER"),
        ("task:jsonl:sums.jsonl#question,answer,more", "write task:jsonl:FILE#QUESTION,ANSWER"),
        ("task:jsonl:empty.jsonl#question,answer", "empty.jsonl: has no problem"),
        ("task:jsonl:sums.jsonl#quest,answer", 'sums.jsonl:1: no field "quest"'),
        (f"{TASK}?validaton=x.jsonl", "no parameter 'validaton'; did you mean validation?"),
        (f"{TASK}?files=x.jsonl", "no parameter 'files'"),
        (f"{TASK}?validation=no.jsonl", "no file matches no.jsonl"),
        (f"{TASK}?validation=sums.jsonl", "all its questions are in sums.jsonl too"),
        (f"{TASK}?answer_after=%26%26", "has no '&&' (answer_after)"),
        ("task:parquet:sums.jsonl#question,answer", "cannot be read as Parquet"),
        ("task:parquet:twice.parquet#question,answer", 'has two columns named "question"'),
        ("task:jsonl:folder#question,answer", "folder"),
        ("task:jsonl:cut.jsonl.gz#question,answer", "cut.jsonl.gz: not a whole gzip file"),
    ],
)
def test_a_wrong_source_is_one_line_that_has_it(spec, words):
    write("sums.jsonl", RECORDS)
    Path("empty.jsonl").write_text("\n \n")
    Path("folder").mkdir()
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 9_999)[:-9])
    column = pyarrow.array(["a"])
    table = pyarrow.Table.from_arrays([column] * 3, names=["question", "question", "answer"])
    pyarrow.parquet.write_table(table, "twice.parquet")
    with pytest.raises(UserError) as error:
        draw_problems(spec, "train", 10, seed=0)
    assert words in str(error.value) and spec in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", range(0, 2_000, 97))
def test_a_flipped_byte_of_a_parquet_file_is_read_or_one_line(at):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), "sums.parquet")
    content = bytearray(Path("sums.parquet").read_bytes())
    content[at % len(content)] ^= 0xFF
    Path("sums.parquet").write_bytes(content)
    try:
        draw_problems("task:parquet:sums.parquet#question,answer", "train", 10, seed=0)
    except UserError as error:
        assert "sums.parquet" in str(error)
