"""Safetensors files: what is written is read, a few rows at a time, and by others; what is damaged
or half written is refused in one line.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints.hf.safetensors import DTYPES, INDEX, SINGLE, TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from errors import UserError


def file_of(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a file by the format's definition, without our writer."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(kind: object, shape: Sequence[float], begin: int, end: int) -> dict:
    """A tensor's entry in a header, also with a dtype or a shape that no tensor has."""
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


PAIR = {"a": entry("I32", [2, 3], 0, 24), "b": entry("BF16", [], 24, 26)}
# bfloat16 keeps the upper half of float32's 1.0, 0x3f80.
PAIR_BYTES = np.arange(6, dtype="<i4").tobytes() + b"\x80\x3f"


def tensors() -> dict[str, np.ndarray]:
    """Tensors of every dtype, in an order that does not align them; a scalar, an empty one."""
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 8), dtype=np.uint8)
    every = {f"of.{name}": bits.astype(dtype) for name, dtype in reversed(DTYPES.items())}
    return every | {
        "scalar": np.array(2.5, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "odd": np.ones(3, np.uint8),
        "last": np.ones((2, 2)),
    }


def plan(of: dict[str, np.ndarray]) -> list:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in of.items()]


def save(
    directory: Path,
    of: dict[str, np.ndarray],
    shard_bytes: int = 10**9,
    stop: int | None = None,
    source: str = "here",
) -> list[str]:
    """Writes the tensors that are not done yet, row by row; after `stop` of them a part of the
    next, as if killed. Returns the names of those it wrote.
    """
    writer = TensorWriter(directory, plan(of), source, shard_bytes)
    todo = [name for name in of if name not in writer.done]
    for name in todo[:stop]:
        rows = of[name]
        for row in [rows] if rows.ndim == 0 or not rows.size else np.split(rows, len(rows)):
            writer.write(name, row)
    if stop is None:
        writer.close()
    else:
        writer.write(todo[stop], of[todo[stop]][:1])
    return todo[:stop]


def assert_same(directory: Path, of: dict[str, np.ndarray]) -> None:
    files = TensorFiles(directory)
    assert files.tensors.keys() == of.keys()
    for name, tensor in of.items():
        info, read = files.tensors[name], files.read(name)
        assert (info.dtype, info.shape, info.bytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert (read.dtype, read.shape, read.tobytes()) == (
            tensor.dtype,
            tensor.shape,
            tensor.tobytes(),
        )


def test_reads_a_file_of_another_writer(tmp_path):
    file_of(tmp_path / SINGLE, {"__metadata__": {"format": "pt"}} | PAIR, PAIR_BYTES)
    files = TensorFiles(tmp_path)
    np.testing.assert_array_equal(files.read("a"), [[0, 1, 2], [3, 4, 5]])
    assert files.read("b") == 1
    np.testing.assert_array_equal(files.read("a", 1), [[3, 4, 5]])
    np.testing.assert_array_equal(files.read("a", 0, 1), [[0, 1, 2]])
    assert files.read("a", 1, 1).shape == (0, 3)
    with pytest.raises(IndexError, match="a: rows 1 to 3 of 2"):
        files.read("a", 1, 3)


@pytest.mark.parametrize("count", range(1, 9))
def test_what_it_writes_follows_the_format(tmp_path, count):
    """The header has whole eights of bytes, and every tensor begins at a multiple of its items'
    size, without which torch cannot view it.
    """
    of = dict(list(tensors().items())[-count:])
    save(tmp_path, of)
    content = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {
        "format": "pt",
        "source": hashlib.sha256(b"here").hexdigest()[:16],
    }
    assert header.keys() == of.keys()
    for name, tensor in of.items():
        begin, end = header[name]["data_offsets"]
        assert content[8 + length :][begin:end] == tensor.tobytes()
        assert begin % tensor.itemsize == 0
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


@pytest.mark.parametrize("shard_bytes", [10**9, 500, 1], ids=["one file", "some", "one each"])
def test_comes_back(tmp_path, shard_bytes):
    of = tensors()
    save(tmp_path / "new" / "directory", of, shard_bytes)
    assert_same(tmp_path / "new" / "directory", of)
    shards = sorted(path.name for path in (tmp_path / "new" / "directory").glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert shards == [SINGLE]
        return
    assert shards == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "new" / "directory" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in of.values())
    assert list(index["weight_map"]) == list(of)
    assert set(index["weight_map"].values()) == set(shards)


def test_goes_on_where_it_stopped(tmp_path):
    """Shards have three tensors. What is not whole is refused by readers, and gone at the end."""
    of = {str(i): np.full((2, 8), i, np.float32) for i in range(8)}
    assert len(save(tmp_path, of, 3 * 64, stop=4)) == 4
    with pytest.raises(
        UserError,
        match=r"1 of 3 shards, and no model.safetensors.index.json;"
        r" it was not written or downloaded to its end",
    ):
        TensorFiles(tmp_path)
    (tmp_path / "model-00001-of-00009.safetensors.tmp").touch()  # of a run with smaller shards
    assert len(save(tmp_path, of, 3 * 64)) == 5
    assert_same(tmp_path, of)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert save(tmp_path, of, 3 * 64) == ["3", "4", "5"]
    assert_same(tmp_path, of)
    assert save(tmp_path, of, 3 * 64) == []
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("change", ["source", "values' shapes", "number of shards", "size"])
def test_shards_of_another_checkpoint_are_not_taken(tmp_path, change):
    of = {str(i): np.full((2, 8), i, np.float32) for i in range(8)}
    save(tmp_path, of, 3 * 64)
    if change == "size":
        with open(tmp_path / "model-00001-of-00003.safetensors", "ab") as file:
            file.write(b"x")
    other = {
        "source": (of, 3 * 64, "there"),
        "number of shards": (of, 2 * 64, "here"),
        "size": (of, 3 * 64, "here"),
    }.get(change)
    of, shard_bytes, source = other or (
        {name: tensor.reshape(4, 4) for name, tensor in of.items()},
        3 * 64,
        "here",
    )
    with pytest.raises(
        UserError,
        match=r"model-0000.-of-00003.safetensors: from another checkpoint;"
        r" delete it, or write to another directory",
    ):
        TensorWriter(tmp_path, plan(of), source, shard_bytes)


def test_a_failure_leaves_nothing_half_written(tmp_path):
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path, plan(tensors()), "here"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot write there: File exists"):
        TensorWriter(tmp_path / "file", [], "here")


def test_only_what_was_planned_is_written(tmp_path):
    writer = TensorWriter(tmp_path, [("a", np.float32, (2, 3)), ("b", np.float32, ())], "here")
    for name, rows in [
        ("b", np.zeros((), np.float32)),
        ("a", np.zeros((3, 3), np.float32)),
        ("a", np.zeros((1, 3))),
        ("a", np.zeros((1, 2), np.float32)),
    ]:
        with pytest.raises(ValueError, match=name):
            writer.write(name, rows)
    a = np.arange(6, dtype=np.float32).reshape(3, 2).T  # in whatever order it lies in memory
    writer.write("a", a)
    with pytest.raises(ValueError, match="b was not written"):
        writer.close()
    writer.write("b", np.ones((), np.float32))
    writer.close()
    np.testing.assert_array_equal(TensorFiles(tmp_path).read("a"), a)


HUGE = 10**12
NO_HEADER = "not a safetensors file (its header is not the JSON it should be)"
DAMAGES = {
    "empty": (b"", b"", None, "not a safetensors file"),
    "length": (
        PAIR,
        PAIR_BYTES,
        HUGE,
        f"not a safetensors file (its header would be {HUGE} bytes long)",
    ),
    "header cut": (PAIR, b"", 1000, "truncated: "),
    "cut": (PAIR, PAIR_BYTES[:-1], None, "truncated: "),
    "longer": (PAIR, PAIR_BYTES + b"x", None, "damaged: "),
    "no JSON": (b"{'a'}", b"", None, NO_HEADER),
    "a list": (b"[1]", b"", None, NO_HEADER),
    "no shape": ({"a": {"dtype": "I32"}}, b"", None, NO_HEADER),
    "nested": (b"[" * 100_000, b"", None, NO_HEADER),
    "shape of halves": ({"a": entry("I32", [0.5, 2], 0, 4)}, b"1234", None, NO_HEADER),
    "a shape of more bytes than there are": (
        {"a": entry("I8", [0, *[2**62] * 9], 0, 0)},
        b"",
        None,
        NO_HEADER,
    ),
    "a number of many digits": ({"a": entry("I8", [10**4000], 0, 1)}, b"1", None, NO_HEADER),
    "a shape of many axes": ({"a": entry("I8", [1] * 100, 0, 1)}, b"1", None, NO_HEADER),
    "half a character": ({"a\ud83d": entry("I8", [1], 0, 1)}, b"1", None, NO_HEADER),
    "a long name": ({"a" * 5000: entry("I8", [2], 0, 1)}, b"1", None, "a" * 200 + ", I8 of"),
    "three offsets": (
        {"a": entry("I8", [1], 0, 1) | {"data_offsets": [0, 1, 2]}},
        b"1",
        None,
        NO_HEADER,
    ),
    "dtypes": ({"a": entry(["I8"], [1], 0, 1)}, b"1", None, NO_HEADER),
    "dtype": (
        {"a": entry("F4", [2], 0, 1)},
        b"x",
        None,
        "a is of dtype F4, which is unknown here (known: F64, ",
    ),
    "size": (
        {"a": entry("I32", [2], 0, 4)},
        b"1234",
        None,
        "a, I32 of shape [2], cannot fill bytes 0 to 4",
    ),
    "overlap": (
        {"a": entry("I32", [1], 0, 4), "b": entry("I8", [2], 3, 5)},
        b"12345",
        None,
        "b begins at byte 3 and the tensor before it ends at 4",
    ),
    "gap": (
        {"a": entry("I8", [1], 1, 2)},
        b"12",
        None,
        "a begins at byte 1 and the tensor before it ends at 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    header, data, length, message = DAMAGES[damage]
    file_of(tmp_path / SINGLE, header, data, length)
    if damage == "empty":
        (tmp_path / SINGLE).write_bytes(b"")
    with pytest.raises(UserError) as error:
        TensorFiles(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / SINGLE}: {message}")
    assert "\n" not in str(error.value)


def test_cut_while_it_is_read(tmp_path):
    file_of(tmp_path / SINGLE, PAIR, PAIR_BYTES)
    files = TensorFiles(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors: ends within a; it is truncated"):
        files.read("a")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "one", "b": "two"}, f"{INDEX}: names two, which is not there"),
        ({"a": "one", "c": "one"}, f"{INDEX}: says that c is in one, which lacks it"),
        ({"a": "a" * 5000}, f"{INDEX}: names {'a' * 100}, which is not there"),
        (["a"], f"{INDEX}: not an index of safetensors files (a JSON object with a weight_map)"),
    ],
    ids=["file", "tensor", "long name", "kind"],
)
def test_an_index_that_is_wrong(tmp_path, index, message):
    file_of(tmp_path / "one", PAIR, PAIR_BYTES)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError) as error:
        TensorFiles(tmp_path)
    assert str(error.value) == f"{tmp_path}/{message}"


def test_without_an_index(tmp_path):
    """Every file counts; two of the same tensor are one too many."""
    with pytest.raises(UserError, match="nowhere: no such directory"):
        TensorFiles(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no safetensors files there"):
        TensorFiles(tmp_path)
    file_of(tmp_path / "x.safetensors", {"c": entry("I8", [1], 0, 1)}, b"\x07")
    file_of(tmp_path / "y.safetensors", PAIR, PAIR_BYTES)
    files = TensorFiles(tmp_path)
    assert sorted(files.tensors) == ["a", "b", "c"]
    assert files.read("c") == [7]
    file_of(tmp_path / "z.safetensors", PAIR, PAIR_BYTES)
    with pytest.raises(UserError, match=r"z\.safetensors: has a, and so has y\.safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("what", ["a directory", "a broken link", "no names in the index"])
def test_what_is_no_file_is_one_line(what, tmp_path):
    if what == "a directory":
        (tmp_path / "model.safetensors").mkdir()
    elif what == "a broken link":
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
        (tmp_path / "other.safetensors").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": null}}')
    with pytest.raises(UserError, match=str(tmp_path)):
        TensorFiles(tmp_path)
