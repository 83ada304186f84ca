"""Trajectories are written a line each and read again, to the bit."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from rl.trajectory import LENGTH, Role, Trajectory
from rl.trajectory_file import as_record, read_trajectories, write_trajectories
from tests.trajectories import trajectory


def drawn(length: int, seed: int) -> Trajectory:
    """Any roles, and log-probs of any size that float32 has."""
    rng = np.random.default_rng(seed)
    return Trajectory(
        rng.integers(0, 2**31 - 1, length).astype(np.int32),
        rng.integers(1, len(Role), length).astype(np.int8),
        (-rng.random(length) * 10.0 ** rng.integers(-44, 3, length)).astype(np.float32),
        -rng.random(length).astype(np.float32),
        rng.integers(-1, 9, length).astype(np.int32),
        LENGTH,
        group=seed,
        sample=seed + 1,
        spans={"thought": ((1, 3), (4, 6)), "an answer": ((6, 9),)},
    )


def test_what_is_read_is_what_was_written(tmp_path):
    written = [drawn(1_000, seed) for seed in range(3)]
    more = [{"question": "1 + 1\n?", "answer": "2", "reward": 0.1 * n} for n in range(3)]
    write_trajectories(tmp_path / "some.jsonl", written, more)
    lines = (tmp_path / "some.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line)["answer"] == "2" for line in lines)
    found = list(read_trajectories(tmp_path / "some.jsonl"))
    assert [others for _, others in found] == more
    for (each, _), expected in zip(found, written, strict=True):
        for field in dataclasses.fields(Trajectory):
            got, want = getattr(each, field.name), getattr(expected, field.name)
            np.testing.assert_array_equal(got, want, err_msg=field.name)
            if isinstance(want, np.ndarray):
                assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
        assert each.spans == expected.spans


def test_what_layers_chose_is_left_out(tmp_path):
    plain = trajectory([1], [2, 3])
    routed = dataclasses.replace(plain, routes_TLK=np.zeros((3, 1, 2), np.int32))
    assert as_record(routed) == as_record(plain)
    write_trajectories(tmp_path / "some.jsonl", [routed])
    ((found, more),) = read_trajectories(tmp_path / "some.jsonl")
    assert found.routes_TLK is None and more == {}


def test_the_documented_lines_run(tmp_path, monkeypatch, capsys):
    """The Python of docs/engine.md, with what it says of an engine."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/engine.md").read_text()
    tokenizer = bytes_tokenizer()
    sampled = trajectory([5], tokenizer.encode("<answer>4"))
    known = {
        "engine": SimpleNamespace(run=lambda prompts: [sampled] * len(prompts)),
        "setup": SimpleNamespace(tokenizer=tokenizer),
        "prompt": None,
    }
    exec(page.split("```python\n")[2].partition("```")[0], known)
    assert capsys.readouterr().out == "{'answer': ((1, 10),)} 1.0\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:40], "line 2: no trajectory"),
        (lambda line: "[]", "line 2: no trajectory"),
        (lambda line: line.replace('"ended"', '"end"'), "line 2: no trajectory .no 'ended'."),
        (lambda line: line.replace("prompt", "poet"), "line 2: no trajectory .no 'poet'."),
        (
            lambda line: line.replace("[2,", "[2, 2,", 1),
            "line 2: no trajectory .its lists are not of one length.",
        ),
    ],
)
def test_a_line_that_is_no_trajectory_is_named(change, message, tmp_path):
    good = json.dumps(as_record(trajectory([2], [2, 3])))
    (tmp_path / "some.jsonl").write_text(f"{good}\n{change(good)}\n")
    read = read_trajectories(tmp_path / "some.jsonl")
    next(read)
    with pytest.raises(UserError, match=f"some.jsonl, {message}"):
        next(read)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        next(read_trajectories(tmp_path / "none.jsonl"))
