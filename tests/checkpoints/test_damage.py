"""Whatever happens to the files of a checkpoint, what is read is what was saved, or an older one
with a line, or one line of error.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.checksums import CHECKSUMS, write_checksums
from checkpoints.restore import restore_parameters
from checkpoints.streamed import StreamedReader, StreamedWriter
from checkpoints.training import Checkpoints
from checkpoints.trees import by_path
from errors import UserError

TRIES = 100  # a fifth of them where a try saves as well


def state_of(step: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(step), 2)
    params = {"embed": jax.random.normal(keys[0], (16, 8)), "scale": jnp.full(3, float(step))}
    return {"params": params, "moments": jax.random.normal(keys[1], (16, 8))}


def numbers():
    return iter(grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with the checkpoints 1 and 2, each at its place in the data."""
    directory, data = tmp_path_factory.mktemp("trained") / "checkpoints", numbers()
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            next(data)
            checkpoints.save(step, state_of(step), data)
    return directory


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("streamed") / "checkpoints"
    for step in (1, 2):
        state = jax.device_get(state_of(step))
        writer = StreamedWriter(directory, step, abstract(state), "here")
        for name, leaf in by_path(state).items():
            writer.write(name, (), leaf)
        writer.mark("all")
        writer.finish()
    return directory


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def harm(checkpoint: Path, chance: random.Random) -> str:
    """Flips a byte of a file, cuts it, or deletes it. Returns what it did."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    kind = chance.choice(["flip", "flip", "cut", "delete"])
    if kind == "delete" or not data:
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: chance.randrange(len(data))])
    else:
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        file.write_bytes(data)
    return f"{kind} {file.relative_to(checkpoint)}"


def same(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def outcome(read, directory: Path, harmed: str, capsys) -> str:
    """Checks that it is the same state, an older one with a line, or a line; returns which.

    `read` returns (step, state, what it should be).
    """
    capsys.readouterr()
    try:
        step, found, wanted = read(directory)
    except UserError as error:
        assert str(error).count("\n") == 0 and "checkpoints" in str(error), harmed
        return "error"
    said = capsys.readouterr().err
    assert same(found, wanted), harmed
    assert said.count("\n") == (step == 1), harmed
    assert step == 2 or ("damaged" in said and "step 1" in said), harmed
    return f"step {step}"


def resumed(directory: Path):
    data = numbers()
    with Checkpoints(directory, keep=2) as checkpoints:
        step = checkpoints.latest()
        assert step
        found = checkpoints.restore(abstract(state_of(0)), data)
        expected = numbers()
        assert [next(expected) for _ in range(step + 1)][-1] == next(data)
        checkpoints.save(2 if step == 1 else 3, found, data)  # what is damaged is not in the way
    return step, found, state_of(step)


def parameters(directory: Path):
    found = restore_parameters(directory, {"params": abstract(state_of(0))["params"]})
    step = int(found["params"]["scale"][0])
    return step, found, {"params": state_of(step)["params"]}


def slices(directory: Path):
    reader = StreamedReader(directory)
    found = {name: reader.read(name) for name in reader.leaves}
    step = int(reader.checkpoint.name)
    return step, found, by_path(state_of(step))


@pytest.mark.parametrize("read", [resumed, parameters, slices])
def test_any_damage_of_a_training_checkpoint_is_seen(read, trained, tmp_path, capsys):
    outcomes = set()
    chance = random.Random(read.__name__)
    for _ in range(TRIES // 5 if read is resumed else TRIES):
        copy = tmp_path / "checkpoints"
        shutil.copytree(trained, copy)
        harmed = harm(copy / "2", chance)
        outcomes.add(outcome(read, copy, harmed, capsys))
        shutil.rmtree(copy)
    assert outcomes == {"step 1", "step 2"}


@pytest.mark.parametrize("read", [parameters, slices])
def test_any_damage_of_a_streamed_checkpoint_is_seen(read, streamed, tmp_path, capsys):
    outcomes = set()
    chance = random.Random(read.__name__)
    for _ in range(TRIES):
        copy = tmp_path / "checkpoints"
        shutil.copytree(streamed, copy)
        harmed = harm(copy / "2", chance)
        outcomes.add(outcome(read, copy, harmed, capsys))
        shutil.rmtree(copy)
    assert "step 1" in outcomes


def test_where_all_are_damaged_nothing_begins_anew(trained, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(trained, copy)
    for step in ("1", "2"):
        (copy / step / "state" / "manifest.ocdbt").unlink()
    for read in (resumed, parameters, slices):
        with pytest.raises(UserError, match=r"/2: damaged \(state/manifest.ocdbt: is missing"):
            read(copy)
    assert sorted(os.listdir(copy)) == ["1", "2"]


def test_a_damaged_checkpoint_that_is_named_is_an_error(trained, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(trained, copy)
    (copy / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"2: damaged \(state/manifest.ocdbt: has 0 bytes in place"):
        parameters(copy / "2")
    assert parameters(copy / "1")[0] == 1


def test_checkpoints_without_checksums_are_read(trained, streamed, tmp_path, capsys):
    for kind, reads in ((trained, (resumed, parameters, slices)), (streamed, (parameters, slices))):
        for read in reads:
            copy = tmp_path / "checkpoints"
            shutil.copytree(kind, copy)
            for file in copy.rglob(CHECKSUMS):
                file.unlink()
            found = outcome(read, copy, "nothing", capsys)
            assert found == "step 2"
            shutil.rmtree(copy)


# Orbax gives up its event loop while reads are under way, which Python notes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("read", [resumed, parameters])
def test_damage_without_checksums_is_one_line_or_not_seen(read, trained, tmp_path, capsys):
    """As of checkpoints that earlier versions wrote: never a traceback."""
    chance = random.Random(0)
    for _ in range(TRIES // 5 if read is resumed else TRIES):
        copy = tmp_path / "checkpoints"
        shutil.copytree(trained, copy)
        for file in copy.rglob(CHECKSUMS):
            file.unlink()
        harm(copy / "2", chance)
        try:
            read(copy)
        except UserError as error:
            assert str(error).count("\n") == 0
        except AssertionError:  # other numbers: nothing could tell
            pass
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "state",
    ['{"next_index": -1}', '{"next_index": 1' + "0" * 30 + "}", '{"next_index": "x"}', "[]", "{}",
     "", "nul", '{"next_index": NaN}'],
)  # fmt: skip
def test_an_absurd_cursor_is_refused(state, trained, tmp_path):
    """Written by hand, with checksums that are right."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(trained, copy)
    (copy / "2/cursor/process_0-of-1.json").write_text(state)
    write_checksums(copy / "2")
    with pytest.raises(UserError, match=r"checkpoints/2: its data cursor is no place in these"):
        resumed(copy)


def test_checksums_are_of_every_file(trained):
    checkpoint = trained / "2"
    summed = set(json.loads((checkpoint / CHECKSUMS).read_text()))
    files = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    later = {
        CHECKSUMS,
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
    assert {file.as_posix() for file in files} - later == summed - later
    assert any("/d/" in name for name in summed)
