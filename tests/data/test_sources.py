"""Sources: every format gives its documents whole, and the splits are disjoint and stable."""

import gzip
import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data.documents import select_split, uniform_hash
from data.file_set import stdlib_files
from data.sources import open_source
from errors import UserError

RECORDS = [{"question": f"q {index} 你", "solution": index} for index in range(40)]


def bodies(spec, chunk_bytes=1000) -> list[Any]:
    """Returns the bodies of all documents of a source."""
    source = open_source(str(spec), chunk_bytes)
    return [source[index].body for index in range(len(source))]


def write_array_record(path, records: list[bytes]):
    """Writes an ArrayRecord file."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_the_chunks_of_a_file_are_the_file(corpus):
    files = [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))]
    for chunk_bytes in (50, 64, 1000, 10**6):
        source = open_source(f"text:{corpus}/*.txt", chunk_bytes)
        chunks = [source[index] for index in range(len(source))]
        assert "".join(bodies(f"text:{corpus}/*.txt", chunk_bytes)) == "".join(files)
        assert sum(chunk.begins for chunk in chunks) == sum(chunk.ends for chunk in chunks) == 12
        sizes = [len(str(chunk.body).encode()) for chunk in chunks]
        assert min(sizes) > 0 and max(sizes) < 2 * chunk_bytes


def test_lines_are_cut_only_if_they_must(corpus):
    assert all(body.endswith("\n") for body in bodies(f"text:{corpus}/*.txt", 100))


def test_a_line_without_end_is_cut_between_characters(tmp_path):
    text = "🙂" * 500 + "é" * 77
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    for chunk_bytes in (5, 6, 7, 101):
        chunks = bodies(f"text:{tmp_path}/long.txt", chunk_bytes)
        assert "".join(chunks) == text
        assert len(chunks) > 1


def test_standard_library_is_code_of_this_python():
    names = stdlib_files().names
    assert "argparse.py" in names and "json/decoder.py" in names
    left_out = {"test", "tests", "site-packages", "idlelib"}
    assert not any(left_out & set(name.split("/")) for name in names)
    source = open_source("stdlib", 4096)
    assert all(source[index].body for index in range(0, len(source), 97))


def test_record_formats_agree(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "a.jsonl").write_text("\n" + lines + "\n\n")  # blank lines are no records
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=7
    )
    write_array_record(tmp_path / "a.arrayrecord", [line.encode() for line in lines.splitlines()])
    write_array_record(
        tmp_path / "text.arrayrecord", [record["question"].encode() for record in RECORDS]
    )
    expected = [record["question"] for record in RECORDS]
    for spec in (
        "jsonl:{}/*.jsonl#question",
        "jsonl:{}/*.gz#question",
        "parquet:{}/a.parquet#question",
        "arrayrecord:{}/a.arrayrecord#question",
    ):
        assert bodies(spec.format(tmp_path)) == expected
    assert bodies(f"arrayrecord:{tmp_path}/text.arrayrecord") == expected


def test_many_files_are_one_source(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"t": f"{name}{index}"}) + "\n" for index in range(3))
        )
    (tmp_path / "empty.jsonl").write_text("")
    assert bodies(f"jsonl:{tmp_path}/*.jsonl#t") == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_conversations_are_bodies(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet"
    )
    assert (
        bodies(f"jsonl:{tmp_path}/a.jsonl#messages")
        == bodies(f"parquet:{tmp_path}/a.parquet#messages")
        == [messages]
    )


@pytest.mark.parametrize("tools", [[{"name": "f", "parameters": {"x": [1, 2]}}], None, []])
def test_a_conversation_comes_with_its_tools(tmp_path, tools):
    """They are a list, or the JSON of one. A text has none, whatever its record says."""
    messages = [{"role": "user", "content": "hi"}]
    for number, written in enumerate((tools, json.dumps(tools))):
        record = {"messages": messages, "text": "a", "tools": written}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([record]), tmp_path / f"{number}.parquet"
        )
        write_array_record(tmp_path / f"{number}.arrayrecord", [json.dumps(record).encode()])
        for kind in ("jsonl", "parquet", "arrayrecord"):
            document, text = (
                open_source(f"{kind}:{tmp_path}/{number}.{kind}#{field}", 1000)[0]
                for field in ("messages", "text")
            )
            assert (document.body, document.tools) == (messages, tools or None)
            assert (text.body, text.tools) == ("a", None)


@pytest.mark.parametrize("spec", ["stdlib", "text:{}/*.txt", "task:arithmetic?count=500"])
def test_splits_are_disjoint_and_whole(corpus, spec):
    source = open_source(spec.format(corpus), 200)
    train, validation = select_split(source, "train", 0.3), select_split(source, "validation", 0.3)
    keys = [{source.key(index) for index in half._indices} for half in (train, validation)]
    assert not keys[0] & keys[1]
    assert len(train) + len(validation) == len(source)


def test_a_moved_corpus_keeps_its_split(corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in corpus.glob("*.txt"):
        (moved / path.name).write_bytes(path.read_bytes())
    names = [
        [
            document.name
            for document in select_split(open_source(f"text:{root}/*.txt", 200), "validation", 0.3)
        ]
        for root in (corpus, moved)
    ]
    assert names[0] == names[1] != []


def test_the_hash_is_the_same_everywhere():
    """Another value would mix the validation documents of every old run into training."""
    assert uniform_hash("argparse.py") == 0.9211056780453042
    # Of a uniform distribution the mean is outside 0.5 +- 0.028 three times out of a thousand.
    assert 0.45 < sum(uniform_hash(str(index)) for index in range(1000)) / 1000 < 0.55


def test_bad_sources_are_one_line(tmp_path):
    def message(spec):
        with pytest.raises(UserError) as error:
            bodies(spec.format(tmp_path))
        text = str(error.value)
        assert "\n" not in text
        return text

    assert 'did you mean "jsonl"?' in message("json:{}/x")
    assert 'no file matches "text:' in message("text:{}/*.md")
    assert "does not say which field" in message("jsonl:{}/x.jsonl")
    assert 'write just "stdlib"' in message("stdlib:*.py")
    (tmp_path / "empty.txt").write_text("")
    assert "only empty files" in message("text:{}/empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"x" * 1500 + b"\n" + "café".encode("latin-1"))
    assert "latin.txt: not UTF-8 at byte 1504" in message("text:{}/latin.txt")
    (tmp_path / "x.jsonl").write_text(
        '{"question": "a", "answer": "b"}\n\n{"question": "a", "solution": "b"}\n'
    )
    assert message("jsonl:{}/x.jsonl#answer").endswith(
        'x.jsonl:3: no field "answer" (has: "question", "solution")'
    )
    (tmp_path / "y.jsonl").write_text('{"a": 1}\n')
    assert 'y.jsonl:1: field "a" is 1, neither text nor a list' in message("jsonl:{}/y.jsonl#a")
    (tmp_path / "chat.jsonl").write_text('{"a": [{"role": "user"}], "tools": {"f": 1}}')
    assert (
        'chat.jsonl:1: field "tools" is {"f": 1}, not a list of descriptions of tools'
        in message("jsonl:{}/chat.jsonl#a")
    )
    (tmp_path / "roles.jsonl").write_text('{"a": [{"from": "user"}]}')
    assert 'not a list of messages with "role"' in message("jsonl:{}/roles.jsonl#a").replace(
        "neither text nor", "not"
    )
    (tmp_path / "z.jsonl").write_text('{"a": "1"}\nnot json\n')
    assert "z.jsonl:2: not JSON" in message("jsonl:{}/z.jsonl#a")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    assert "list.jsonl:1: a JSON list, not an object" in message("jsonl:{}/list.jsonl#a")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    assert "bad.jsonl.gz: not a whole gzip file" in message("jsonl:{}/*.gz#a")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    assert "bad.parquet: not a Parquet file" in message("parquet:{}/bad.parquet#a")
    pyarrow.parquet.write_table(pyarrow.table({"b": ["x"]}), tmp_path / "b.parquet")
    assert 'b.parquet: no field "a" (has: "b")' in message("parquet:{}/b.parquet#a")
    assert "not an ArrayRecord file" in message("arrayrecord:{}/bad.parquet#a")


def test_a_split_without_documents_says_so(corpus):
    source = open_source(f"text:{corpus}/00.txt", 1000)
    with pytest.raises(
        UserError, match=r"has 1 documents, and data.validation = 0.0 leaves none for validation"
    ):
        select_split(source, "validation", 0.0)
    with pytest.raises(ValueError, match="split = 'test'"):
        select_split(source, "test", 0.5)  # pyright: ignore[reportArgumentType] the error itself
