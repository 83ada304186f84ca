"""Every line of metrics.jsonl is valid JSON, and there is one a step, also after a run that
died.
"""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from errors import UserError
from tests.full_disk import small_files
from train.metrics import Metrics, read_metrics


def steps(workdir, phase="pretrain"):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [line["step"] for line in lines if line["stage"] == phase]


def test_any_kind_of_number_becomes_strict_json(tmp_path):
    values = {
        "loss": jnp.float32(1.2),
        "half": jnp.bfloat16(0.5),
        "double": np.float64(0.1),
        "count": np.int64(3),
        "nan": jnp.float32(jnp.nan),
        "inf": float("-inf"),
        "load": jnp.array([[1.0, 0.5], [jnp.nan, 2.0]]),
        "list": [1.5, np.float32(2.5), math.inf],
        "name": "dr_grpo",
    }
    with Metrics(tmp_path / "new", "pretrain") as metrics:
        metrics.write(jnp.int32(10), values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "new" / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {
        "step": 10, "stage": "pretrain", "loss": 1.2, "half": 0.5, "double": 0.1, "count": 3,
        "nan": None, "inf": None, "load": [[1.0, 0.5], [None, 2.0]], "list": [1.5, 2.5, None],
        "name": "dr_grpo",
    }  # fmt: skip
    assert math.isnan(read_metrics(tmp_path / "new" / "metrics.jsonl")[0]["nan"])


def test_numbers_keep_every_bit(tmp_path):
    exponents = np.arange(-40, 35).repeat(14)[:1000].astype(np.float32)
    normal = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    numbers = normal * np.float32(10.0) ** exponents
    with Metrics(tmp_path, "x") as metrics:
        metrics.write(1, {"numbers": numbers})
    found = read_metrics(tmp_path / "metrics.jsonl")[0]["numbers"]
    np.testing.assert_array_equal(np.asarray(found, np.float32), numbers)


def test_lines_are_there_at_once(tmp_path):
    """A run that is killed has written what it measured."""
    metrics = Metrics(tmp_path, "pretrain")
    metrics.write(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]
    metrics.close()


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
    with Metrics(tmp_path, "warmup") as metrics:
        metrics.write(99, {"loss": 0.0})
    # The second died before its first checkpoint.
    for resume_step, first in ((0, 0), (0, 0), (6, 7)):
        with Metrics(tmp_path, "pretrain", resume_step=resume_step) as metrics:
            for step in range(first, 10):
                metrics.write(step, {"loss": float(resume_step)})
    assert steps(tmp_path) == list(range(10))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["stage"] == "pretrain"]
    assert losses == [0.0] * 7 + [6.0] * 3
    assert steps(tmp_path, "warmup") == [99]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_line_cut_short_is_dropped(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sta')
    assert steps(tmp_path) == [1]
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(3, {"loss": 1.0})
    assert steps(tmp_path) == [1, 3]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1, 2]\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"none.jsonl: cannot read: No such file"):
        read_metrics(tmp_path / "none.jsonl")


def scalars_of(file: Path) -> dict[str, tuple[int, float]]:
    parse = vars(event_pb2)["Event"].FromString  # protobuf makes the class when it is imported
    data, scalars = file.read_bytes(), {}
    while data:  # length 8 bytes, its checksum 4, the event, its checksum 4
        length = int.from_bytes(data[:8], "little")
        event = parse(data[12 : 12 + length])
        checks = [int.from_bytes(data[at : at + 4], "little") for at in (8, 12 + length)]
        assert checks == [masked_crc32c(part) for part in (data[:8], data[12 : 12 + length])]
        scalars |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    return scalars


def test_tensorboard_has_the_scalars(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(
            5, {"loss": jnp.float32(1.5), "load": [1.0, 2.0], "nan": math.nan, "name": "x"}
        )
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert scalars_of(file) == {"pretrain/loss": (5, 1.5)}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path / "x", "pretrain") as metrics:
        metrics.write(1, {"loss": 1.0})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("large", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_line_and_no_part_of_a_step(large, tmp_path):
    """Whichever of the two files cannot grow; a later start goes on."""
    names = [f"name_{number}" for number in range(8)]
    # Text is longer than events are, and a long word is in metrics.jsonl alone.
    word = {"word": "x" * 200} if large == "metrics.jsonl" else {}
    metrics, written = Metrics(tmp_path, "pretrain"), 0
    with small_files(6_000), pytest.raises(UserError, match=rf"{large}.*: cannot write: File too"):
        for step in range(1, 1_000):
            metrics.write(step, dict.fromkeys(names, 0.5) | word)
            written = step
    metrics.close()
    assert steps(tmp_path)[:written] == list(range(1, written + 1))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    with Metrics(tmp_path, "pretrain", resume_step=written) as metrics:
        metrics.write(written + 1, {"name": 1.0})
    assert steps(tmp_path) == list(range(1, written + 2))


def test_event_files_are_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    for now in (2e9, 1e9, 3e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with Metrics(tmp_path, "pretrain", resume_step=0) as metrics:
            metrics.write(1, {"loss": now})
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [scalars_of(file) for file in files] == [
        {"pretrain/loss": (1, np.float32(now))} for now in (2e9, 1e9, 3e9)
    ]


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/metrics.jsonl: cannot write: "):
        Metrics(tmp_path / "file", "pretrain")
