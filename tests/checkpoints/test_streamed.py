"""A checkpoint written block by block is one like any other, however often its writer was stopped;
and slices of any checkpoint can be read.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import chunking, streamed, trees
from checkpoints.checksums import CHECKSUMS
from checkpoints.restore import restore_parameters
from checkpoints.streamed import StreamedReader, StreamedWriter
from checkpoints.training import Checkpoints
from errors import UserError

CHUNKS = {"params/blocks/w": (1, 5, 6)}  # 5 does not divide 8: blocks share chunks


@flax.struct.dataclass
class State:
    step: Any
    params: dict
    router: dict


def make_state(rows: int = 8) -> State:
    """A state with bfloat16, float32, int32, a scalar, all zeros, an empty part; and values that a
    careless copy changes.
    """
    w = np.random.default_rng(0).standard_normal((4, rows, 6), dtype=np.float32)
    params = {
        "blocks": {"w": w, "none": {}},
        "embed": np.arange(35).reshape(7, 5).astype(jnp.bfloat16),
        "zeros": np.zeros((3, 4), np.float32),
    }
    return State(
        np.asarray(7, np.int32),
        params,
        {
            "bias": np.array([np.nan, -0.0, 1e-40, np.inf], np.float32),
            "count": np.arange(9, dtype=np.int32),
        },
    )


def abstract(state: Any, sharding=None) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def blocks(state: State) -> list[tuple[str, list[tuple[str, tuple, np.ndarray]]]]:
    """The writes of each block, by its name: w in parts of a layer, with which no chunk begins or
    ends, and the rest at once.
    """
    w = "params/blocks/w"
    parts = [(layer, rows) for layer in range(4) for rows in (slice(0, 3), slice(3, None))]
    of_w = [
        (f"w {layer} {rows.start}", [(w, (layer, rows), state.params["blocks"]["w"][layer, rows])])
        for layer, rows in parts
    ]
    rest = [(name, (), leaf) for name, leaf in trees.by_path(state).items() if name != w]
    return [*of_w, ("rest", rest)]


def write(
    directory: Path,
    state: State,
    source: str = "here",
    stop: int | None = None,
    writer_class: type[StreamedWriter] = StreamedWriter,
) -> list[str]:
    """Writes the blocks that are not done yet; with `stop` so many at most, and then no end.
    Returns the names of those it wrote.
    """
    writer = writer_class(directory, 3, abstract(state), source, CHUNKS)
    todo = [block for block in blocks(state) if block[0] not in writer.done][:stop]
    for name, writes in todo:
        for leaf, index, value in writes:
            writer.write(leaf, index, value)
        writer.mark(name)
    if stop is None:
        writer.finish()
    else:
        writer._wait_until_pending(0)
    return [name for name, _ in todo]


def run_process(name: str, directory: Path, **options: Any) -> subprocess.CompletedProcess:
    """Runs a function of tests/checkpoints/processes.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.processes", name, str(directory)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | options.pop("env", {}),
        text=True,
        **options,
    )


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def sharding():
    return NamedSharding(
        jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2), P("fsdp")
    )


def test_is_restored_like_any_other(tmp_path, sharding):
    state = make_state()
    write(tmp_path / "checkpoints", state)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    wanted = abstract({"params": state.params, "router": state.router})
    wanted["params"]["blocks"] = abstract(state.params["blocks"], sharding)
    restored = restore_parameters(tmp_path, wanted)
    assert_identical(restored, {"params": state.params, "router": state.router})
    assert restored["params"]["blocks"]["w"].sharding == sharding
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        assert_identical(checkpoints.restore(abstract(state)), state)
        checkpoints.save(4, state)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_goes_on_where_it_stopped(tmp_path):
    """Stopped four times, once with the journal's last line cut off. What is unfinished is no
    checkpoint, and no other run cleans it up.
    """
    state, journal = make_state(), tmp_path / "3.unfinished" / "journal"
    assert write(tmp_path, state, stop=2) == ["w 0 0", "w 0 3"]
    assert write(tmp_path, state, stop=1) == ["w 1 0"]
    with pytest.raises(UserError, match="no checkpoint there"):
        restore_parameters(tmp_path, abstract({"params": state.params}))
    with pytest.raises(UserError, match="no checkpoint there"):
        restore_parameters(tmp_path / "3.unfinished", abstract({"params": state.params}))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
    assert write(tmp_path, state, stop=2) == ["w 1 3", "w 2 0"]
    journal.write_bytes(journal.read_bytes()[:-7])
    assert write(tmp_path, state, stop=1) == ["w 2 0"]
    assert write(tmp_path, state)[0] == "w 2 3"
    assert_identical(
        restore_parameters(tmp_path, abstract({"params": state.params})), {"params": state.params}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_chunk_half_written_is_forgotten(tmp_path):
    """Killed while it writes a chunk, tensorstore leaves this file, and would write the chunk into
    its beginning.
    """
    state = make_state()
    write(tmp_path, state, stop=1)
    (tmp_path / "3.unfinished/checkpoint/state/params.blocks.w/0.0.0.__lock").write_bytes(
        b"x" * 10_000
    )
    write(tmp_path, state)
    assert_identical(
        restore_parameters(tmp_path, abstract({"params": state.params})), {"params": state.params}
    )
    assert list(tmp_path.rglob("*__lock")) == []


@pytest.mark.command
def test_goes_on_after_it_was_killed_with_writes_pending(tmp_path):
    killed = run_process("killed_at_the_third_block", tmp_path)
    assert killed.returncode == -signal.SIGKILL
    state = make_state()
    assert len(write(tmp_path, state)) == len(blocks(state)) - 2
    assert_identical(
        restore_parameters(tmp_path, abstract({"params": state.params})), {"params": state.params}
    )


@pytest.mark.parametrize("left", ["skeleton/0/state", "journal"])
def test_what_a_killed_process_left_at_its_beginning_or_end(tmp_path, left):
    """A skeleton half made; a journal whose checkpoint is finished, and then deleted."""
    write(tmp_path, make_state(), stop=1)
    unfinished = tmp_path / "3.unfinished"
    journal = (unfinished / "journal").read_bytes()
    shutil.rmtree(unfinished)
    (unfinished / left).parent.mkdir(parents=True)
    (unfinished / left).write_bytes(journal)
    assert write(tmp_path, make_state())[0] == "w 0 0"
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_is_not_whole_is_not_finished(tmp_path):
    state = make_state()
    write(tmp_path, state, stop=7)
    writer = StreamedWriter(tmp_path, 3, abstract(state), "here")
    for name, index, value in blocks(state)[-1][1]:
        writer.write(name, index, value)
    writer.mark("rest")
    with pytest.raises(ValueError, match="params/blocks/w: 162 of 192 elements written and marked"):
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["3.unfinished"]


def test_another_state_or_source_is_refused(tmp_path):
    write(tmp_path, make_state(), stop=1)
    with pytest.raises(UserError) as error:
        write(tmp_path, make_state(rows=9))
    clause = "params/blocks/w is [4,8,6] there, [4,9,6] in this config"
    begun = f"{tmp_path}/3.unfinished: begun for another state: {clause}"
    assert str(error.value) == f"{begun}; delete it to begin anew"
    with pytest.raises(
        UserError, match=r"3\.unfinished: begun from here, not from elsewhere; delete it"
    ):
        write(tmp_path, make_state(), source="elsewhere")
    write(tmp_path, make_state())
    with pytest.raises(UserError, match="3: there already"):
        write(tmp_path, make_state())


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("params/embed", (), np.zeros((7, 5), np.float32)),
        ("params/embed", (0,), np.zeros((7, 5), jnp.bfloat16)),
        # to tensorstore an array has no end
        ("params/embed", (slice(6, 8),), np.zeros((2, 5), jnp.bfloat16)),
        ("step", (), np.zeros((1,), np.int32)),
    ],
)
def test_a_value_that_does_not_fit(tmp_path, name, index, value):
    with pytest.raises(ValueError, match=name):
        StreamedWriter(tmp_path, 3, abstract(make_state()), "here").write(name, index, value)


@pytest.mark.command
def test_full_disk_is_one_line(tmp_path):
    """No file may grow beyond 1 MB. What failed is not in the journal, nor what came after, however
    often one tries to finish.
    """
    result = run_process("full_disk", tmp_path, capture_output=True)
    line = (
        f"{tmp_path}/0.unfinished: cannot write there: File too large;"
        " the same command again goes on from here\n"
    )
    assert result.stdout == 3 * line, result.stderr
    journal = (tmp_path / "0.unfinished" / "journal").read_text()
    header, *done = map(json.loads, journal.splitlines())
    assert header["source"] == "here"
    assert done == []


@pytest.mark.parametrize("where", ["blocks", "one device", "eight devices"])
def test_reads_slices_as_numpy_does(tmp_path, where, sharding):
    """From OCDBT, as `Checkpoints` saves it, with a leaf cut over devices; and from separate files,
    as a StreamedWriter writes them.
    """
    state = make_state()
    if where == "blocks":
        write(tmp_path, state)
    else:
        placed = jax.tree.map(jnp.asarray, state)
        if where == "eight devices":
            placed.params["blocks"]["w"] = jax.device_put(placed.params["blocks"]["w"], sharding)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(3, placed)
    reader = StreamedReader(tmp_path)
    assert reader.checkpoint == tmp_path / "3"
    leaves = trees.by_path(state)
    assert reader.leaves == abstract(leaves)
    for name, leaf in leaves.items():
        assert_identical(reader.read(name), leaf)
    w = leaves["params/blocks/w"]
    for index in [
        (2,),
        (slice(1, 3), -1),
        (slice(None), slice(2, 7), slice(-2, None)),
        (0, slice(6, 99)),
        (0, slice(5, 2)),
    ]:
        assert_identical(reader.read("params/blocks/w", index), w[index])
    for index in [(4,), (-5,), (0, 0, 0, 0)]:
        with pytest.raises(IndexError):
            reader.read("params/blocks/w", index)


def test_damage_is_named(tmp_path):
    """In a checkpoint that has no checksums. A chunk that is gone would pass for zeros."""
    write(tmp_path, make_state())
    (tmp_path / "3" / CHECKSUMS).unlink()
    (tmp_path / "3/state/params.blocks.w/0.0.0").unlink()
    (tmp_path / "3/state/params.embed/0.0").write_bytes(b"x")
    reader = StreamedReader(tmp_path / "3")
    for name in ("params/blocks/w", "params/embed"):
        with pytest.raises(
            UserError, match=f"3: {name} cannot be read: damaged, or a part of it is missing"
        ):
            reader.read(name)
    reader.read("params/blocks/w", (1,))


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        StreamedReader(tmp_path)


def test_large_arrays_are_saved_in_chunks(tmp_path, monkeypatch):
    """Stacked matrices one from another; small arrays as they are."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 512)
    monkeypatch.setattr(chunking, "LEAST_CHUNK_BYTES", 64)
    state = {
        "w": jnp.arange(4 * 3 * 8 * 16.0).reshape(4, 3, 8, 16),
        "small": jnp.ones((2, 8, 8)),
        "table": jnp.ones((64, 16)),
    }
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state)
    reader = StreamedReader(tmp_path)
    assert {name: reader.chunk(name) for name in state} == {
        "w": (1, 1, 8, 16),
        "small": (2, 8, 8),
        "table": (8, 16),
    }
    assert_identical(reader.read("w", (2, 1)), state["w"][2, 1])
    assert_identical(restore_parameters(tmp_path, abstract(state)), state)


def test_waits_when_much_is_pending(tmp_path, monkeypatch):
    """Two blocks of w are 192 bytes; a third does not go beside them."""
    monkeypatch.setattr(streamed, "MAX_PENDING_BYTES", 200)
    state = make_state()
    writer = StreamedWriter(tmp_path, 3, abstract(state), "here")
    for before, (name, [arguments]) in enumerate(blocks(state)[:8]):
        writer.write(*arguments)
        assert len(writer.done) >= before - 1
        writer.mark(name)


@pytest.mark.command
def test_memory_is_that_of_a_few_blocks(tmp_path):
    """128 MB in blocks of 8 MB. Beyond what is there at the start, a writer has two blocks and two
    chunks of them, compressed too; a reader has less. With more than one arena, what each thread's
    keeps of memory given back is counted, by chance 30 to 100 MB.
    """
    options = {"env": {"MALLOC_ARENA_MAX": "1"}, "capture_output": True, "check": True}
    for name in ("memory_of_writing", "memory_of_reading"):
        result = run_process(name, tmp_path, **options)
        assert float(result.stdout) < 64, name  # MB
