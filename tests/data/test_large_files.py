"""Files that are not held in memory: the same documents, by little memory, and damage is said."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data import cache, json_lines, record_files
from data.sources import open_source
from data.waiting import Waiting
from errors import UserError

TURNS = [{"role": "user", "content": "hi 你"}, {"role": "assistant", "content": "ho"}]
RECORDS = [
    {"text": f"q {n} 🙂 " + "abc " * (n * 7 % 60), "m": TURNS * (n % 3 + 1), "n": n}
    for n in range(700)
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The directory of the cache; with it nothing is small enough to stay in memory."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("ATHANOR_CACHE", str(directory))
    monkeypatch.setattr(record_files, "MEMORY_BYTES", 0)
    monkeypatch.setattr(json_lines, "INDEXED_BYTES", 0)
    return directory


def documents(spec):
    source = open_source(str(spec), 1000)
    return [source[index] for index in range(len(source))]


def write_files(directory):
    """Writes the records in every format; returns the specs without the field."""
    (directory / "a.jsonl").write_bytes(b"\n \n" + LINES)
    for suffix, compress in COMPRESS.items():
        half = LINES.index(b"\n", len(LINES) // 2) + 1  # two frames, as parallel compressors write
        (directory / f"a.jsonl{suffix}").write_bytes(
            compress(LINES[:half]) + compress(LINES[half:])
        )
    table = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(table, directory / "one.parquet")
    pyarrow.parquet.write_table(table, directory / "many.parquet", row_group_size=13)
    words = table.set_column(0, "text", table["text"].dictionary_encode())
    pyarrow.parquet.write_table(words, directory / "words.parquet", row_group_size=50)
    names = ["a.jsonl", *(f"a.jsonl{suffix}" for suffix in COMPRESS)]
    tables = ["one.parquet", "many.parquet", "words.parquet"]
    return [f"jsonl:{directory}/{name}" for name in names] + [
        f"parquet:{directory}/{name}" for name in tables
    ]


@pytest.mark.parametrize("field", ["text", "m"])
@pytest.mark.parametrize("memory", [0, 20_000, 2**30])
def test_every_format_gives_the_same_documents(tmp_path, kept, monkeypatch, field, memory):
    monkeypatch.setattr(record_files, "MEMORY_BYTES", memory)
    monkeypatch.setattr(json_lines, "INDEXED_BYTES", memory)
    for spec in write_files(tmp_path):
        found = documents(f"{spec}#{field}")
        assert [document.body for document in found] == [record[field] for record in RECORDS], spec
    assert kept.exists() == (memory < 2**30)


def test_what_is_kept_is_made_once_for_each_state_of_a_file(tmp_path, kept, monkeypatch):
    specs = write_files(tmp_path)
    first = [documents(f"{spec}#text") for spec in specs]
    names = sorted(path.name for path in kept.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(json_lines, "_find_lines", None)
        patch.setattr("data.parquet._write", None)
        assert [documents(f"{spec}#text") for spec in specs] == first
    for spec in specs:
        os.utime(spec.partition(":")[2], ns=(1, 1))
    assert [documents(f"{spec}#text") for spec in specs] == first
    again = sorted(path.name for path in kept.iterdir())
    # The index of decompressed lines belongs to what is kept, so some of it stays behind.
    assert not set(names) & {name for name in again if name.endswith(".1")}
    assert len([name for name in again if name.endswith(".1")]) == len(specs)


def test_a_changed_file_is_read_anew(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "before"}\n')
    assert documents(f"jsonl:{path}#text")[0].body == "before"
    path.write_text('{"text": "afterwards"}\n')
    assert documents(f"jsonl:{path}#text")[0].body == "afterwards"


PROGRAM = """
import resource, sys
import numpy, pyarrow.parquet
from data.sources import open_source
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
source = open_source(sys.argv[1], 4096)
for index in numpy.random.default_rng(0).integers(0, len(source), 500):
    source[int(index)]
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_a_file(tmp_path, kind):
    """Of 120 MB of text in one row group, or compressed, less than 64 MB are in memory.

    It needs a process of its own, whose highest use is its own.
    """
    texts = [f"{n} " + "abcdefgh " * 130 for n in range(100_000)]
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=10**6, use_dictionary=False)
    else:
        path = tmp_path / "a.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{kind}:{path}#text"],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "ATHANOR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert float(ended.stdout) < 64


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_few_files_are_open_at_a_time(tmp_path, kept, kind):
    for number in range(200):
        path = tmp_path / f"{number:03d}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [f"{number}"]}), path)
        else:
            path.write_text(json.dumps({"text": f"{number}"}))
    before = len(os.listdir("/proc/self/fd"))
    found = documents(f"{kind}:{tmp_path}/*.{kind}#text")
    assert [document.body for document in found] == [str(number) for number in range(200)]
    assert len(os.listdir("/proc/self/fd")) - before <= 128


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_damaged_archive_is_one_line(tmp_path, kept, monkeypatch, suffix, memory):
    monkeypatch.setattr(record_files, "MEMORY_BYTES", memory)
    content = COMPRESS[suffix](LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    for damaged in (content[:-9], content[: len(content) // 2], content[:3], b"no archive" * 9):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: not a whole \w+ file") as error:
            open_source(f"jsonl:{path}#text", 1000)
        assert "\n" not in str(error.value)
    assert not kept.exists() or not list(kept.iterdir())  # nothing half-made


@pytest.mark.parametrize("memory", [0, 2**30])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_flipped_page_is_one_line_with_the_file(tmp_path, kept, monkeypatch, memory, compression):
    monkeypatch.setattr(record_files, "MEMORY_BYTES", memory)
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(
        table, path, compression=compression, row_group_size=50, write_page_checksum=True
    )
    whole = path.read_bytes()
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(9).column(0)
    outcomes = []
    for offset in range(0, column.total_compressed_size, 67):
        damaged = bytearray(whole)
        damaged[(column.dictionary_page_offset or column.data_page_offset) + offset] ^= 1
        path.write_bytes(damaged)
        try:
            texts = [document.body for document in documents(f"parquet:{path}#text")]
        except UserError as error:
            assert "a.parquet: damaged after row " in str(error) and "\n" not in str(error)
            outcomes.append("said")
        else:
            assert texts == [record["text"] for record in RECORDS]  # of a page's statistics
            outcomes.append("harmless")
    assert outcomes.count("said") > outcomes.count("harmless")


def test_two_columns_of_one_name(tmp_path):
    """They are refused where they are read, and no matter elsewhere."""
    values = [pyarrow.array([word]) for word in "abc"]
    table = pyarrow.Table.from_arrays(values, names=["x", "x", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet: has 2 columns "x"; rename one'):
        open_source(f"parquet:{tmp_path}/a.parquet#x", 1000)
    assert documents(f"parquet:{tmp_path}/a.parquet#text")[0].body == "c"


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + LINES)
    (tmp_path / "b.jsonl").write_bytes(mark + b"\r\n" + LINES.replace(b"\n", b"\r\n"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(mark + LINES))
    (tmp_path / "d.jsonl").write_bytes(mark + LINES + mark + LINES)  # two files, one after another
    for name, times in (("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl.gz", 1), ("d.jsonl", 2)):
        found = documents(f"jsonl:{tmp_path}/{name}#text")
        assert [document.body for document in found] == [r["text"] for r in RECORDS] * times


def test_names_that_are_not_utf8(tmp_path, kept):
    """Their files are read, and split by the bytes of their names."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"a\xff.txt", b"b\xff.jsonl", b"c\xff.parquet"):
        with open(os.path.join(folder, name), "wb") as file:
            if name.endswith(b"parquet"):
                pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), file)
            else:
                file.write(b'{"text": "x"}')
    for spec in ("text:{}/*/*.txt", "jsonl:{}/*/*.jsonl#text", "parquet:{}/*/*.parquet#text"):
        source = open_source(spec.format(tmp_path), 1000)
        assert "x" in source[0].body
        assert 0 <= cache_key(source) < 1


def cache_key(source):
    from data.documents import uniform_hash

    return uniform_hash(source.key(0))


def test_a_cache_that_may_not_be_written_to_is_one_line(tmp_path, kept, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATHANOR_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=r"ATHANOR_CACHE = .*cannot be written to; name another"):
        open_source(f"jsonl:{tmp_path}/a.jsonl#text", 1000)


def test_without_a_home_the_cache_is_among_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("ATHANOR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache.directory().parent == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache.directory() == tmp_path / "home" / "athanor"


def test_waiting_speaks_after_a_while(capsys):
    now = [0.0]
    waiting = Waiting("reading a", every=5.0, clock=lambda: now[0])
    for second in range(12):
        now[0] = second
        waiting.update(1000 * second, "files", 20_000)
    assert capsys.readouterr().err == (
        "reading a: 5,000 of 20,000 files\nreading a: 10,000 of 20,000 files\n"
    )
