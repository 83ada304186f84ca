"""W&B, Trackio and MLflow: what each is asked, by doubles, and off line by the packages themselves
where they are installed (`pip install -e ".[sinks]"`).
"""

import importlib
import inspect
import json
import struct
import sys
import time
from pathlib import Path

import pytest

from files import write_json
from tests.train import tracker_doubles as doubles
from tests.train.tracker_doubles import FAKES, Stored
from train.config import SINKS
from train.metrics import Metrics, read_metrics
from train.trackers import TRACKERS

CONFIG = {f"field_{n}": n for n in range(250)}
ENVIRONMENT = ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir with a config, and an environment that names no tracker's place."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "a run"
    write_json(found / "config.json", {"config": {"part": CONFIG}})
    return found


@pytest.fixture
def fakes(monkeypatch):
    made = {name: kind() for name, kind in FAKES.items()}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", made["mlflow"].entities)
    return made


def logs(workdir: Path, name: str, first: int, last: int, failed: bool = False) -> None:
    metrics = Metrics(workdir, "reinforce", resume_step=first - 1, sinks=(name,))
    for step in range(first, last + 1):
        metrics.write(step, {"reward": step / 2, "completions/mean_length": 3.0})
        metrics.write(step, {"validation_reward": 0.25})
    metrics.close(failed=failed)


def assert_followed(stored: Stored, workdir: Path) -> None:
    lines = read_metrics(workdir / "metrics.jsonl")
    for metric in ("reward", "completions/mean_length", "validation_reward"):
        expected = [(line["step"], line[metric]) for line in lines if metric in line]
        assert stored.of(metric) == expected and expected
    assert {key: int(value) for key, value in stored.config.items()} == {
        f"part.{key}": value for key, value in CONFIG.items()
    }


def again_after_a_kill(workdir: Path, name: str) -> None:
    """Steps 3 and 4 are taken twice."""
    logs(workdir, name, 1, 4, failed=True)
    logs(workdir, name, 3, 6)


def test_wandb_goes_on_in_the_run_that_it_has(workdir, fakes):
    again_after_a_kill(workdir, "wandb")
    ((id, stored),) = fakes["wandb"].stored.items()
    assert_followed(stored, workdir)
    assert stored.name == "a run" and stored.ended == [1, 0]
    asked = stored.asked
    assert asked["project"] == "athanor" and asked["job_type"] == "reinforce"
    assert asked["dir"] == str(workdir) and asked["id"] == id and asked["reinit"] == "create_new"


def test_wandb_is_sent_what_its_server_lacks(workdir, fakes):
    logs(workdir, "wandb", 1, 6)
    (stored,) = fakes["wandb"].stored.values()
    stored.logged = [each for each in stored.logged if each[0] <= 2]
    logs(workdir, "wandb", 5, 7)
    assert_followed(stored, workdir)


def test_each_start_off_line_has_all_of_a_run_of_wandb(workdir, fakes, monkeypatch):
    """Its directories do not go on from one another: the last one is enough."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    again_after_a_kill(workdir, "wandb")
    first, second = fakes["wandb"].stored.values()
    assert_followed(second, workdir)
    assert first.of("reward") == [(step, step / 2) for step in range(1, 5)]
    assert first.asked["id"] == second.asked["id"]


def test_trackio_goes_on_in_the_run_of_its_name(workdir, fakes):
    again_after_a_kill(workdir, "trackio")
    ((name, stored),) = fakes["trackio"].stored.items()
    assert_followed(stored, workdir)
    assert name.startswith("a run-") and stored.asked["project"] == "athanor"
    other = workdir.parent / "other" / "a run"
    write_json(other / "config.json", {"config": {"part": CONFIG}})
    logs(other, "trackio", 1, 2)
    assert len(fakes["trackio"].stored) == 2, "another run of the same name is another run"


def test_trackio_is_sent_what_died_with_the_run(workdir, fakes):
    logs(workdir, "trackio", 1, 4)
    fakes["trackio"].lose(after=2)
    logs(workdir, "trackio", 4, 5)
    (stored,) = fakes["trackio"].stored.values()
    assert_followed(stored, workdir)


def test_mlflow_goes_on_in_the_run_of_its_id(workdir, fakes, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "own")
    again_after_a_kill(workdir, "mlflow")
    (stored,) = fakes["mlflow"].stored.values()
    assert_followed(stored, workdir)
    assert stored.name == "a run" and stored.ended == ["FAILED", "RUNNING", "FINISHED"]
    assert abs(stored.asked["timestamp"] / 1000 - time.time()) < 60
    other = workdir.parent / "b"
    logs(other, "mlflow", 1, 1)
    assert fakes["mlflow"].experiments == ["own"] and len(fakes["mlflow"].stored) == 2


def taken_by(function) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name != "self"}


def test_the_doubles_are_like_the_packages():
    """What a double takes the package takes: checked of each that is installed."""
    pairs = {
        "wandb": [("init", doubles.FakeWandb.init)],
        "trackio": [("init", doubles.FakeTrackio.init), ("Run.log", doubles.TrackioRun.log),
                    ("Run.finish", doubles.TrackioRun.finish)],
        "mlflow": [(f"MlflowClient.{name}", getattr(doubles.MlflowClient, name)) for name in (
            "get_experiment_by_name", "create_experiment", "create_run", "update_run", "log_batch",
            "set_terminated",
        )],
    }  # fmt: skip
    assert pairs.keys() == TRACKERS.keys() == set(SINKS)
    for package, functions in pairs.items():
        try:
            found = importlib.import_module(package)
        except ImportError:
            continue
        for dotted, double in functions:
            real = found
            for part in dotted.split("."):
                real = getattr(real, part)
            assert taken_by(double) <= taken_by(real), dotted


@pytest.mark.filterwarnings("default")
def test_wandb_off_line(workdir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    again_after_a_kill(workdir, "wandb")
    first, second = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert_followed(in_wandb_file(second), workdir)
    assert first.name == second.name


def in_wandb_file(path: Path) -> Stored:
    """Reads a .wandb file: blocks of 32 KiB with parts of records, each a protobuf message."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, message, stored = path.read_bytes(), 7, b"", Stored("", {})
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        message, at = message + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, message = proto.Record.FromString(message), b""
        if record.WhichOneof("record_type") == "run":
            stored.name = record.run.display_name
            updates = record.run.config.update
            stored.config |= {each.key: json.loads(each.value_json) for each in updates}
            stored.config = {k: v for k, v in stored.config.items() if k.startswith("part.")}
        if record.WhichOneof("record_type") == "history":
            values = {
                each.key or "/".join(each.nested_key): json.loads(each.value_json)
                for each in record.history.item
            }
            stored.logged.append((values["_step"], values))
    return stored


@pytest.mark.filterwarnings("default")
def test_trackio_on_this_machine(workdir, monkeypatch):
    pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage")
    monkeypatch.setenv("TRACKIO_DIR", str(workdir / "trackio"))
    for module in ("trackio.utils", "trackio.sqlite_storage", "trackio"):
        monkeypatch.setattr(
            importlib.import_module(module), "TRACKIO_DIR", workdir / "trackio", raising=False
        )
    again_after_a_kill(workdir, "trackio")
    (name,) = storage.SQLiteStorage.get_runs("athanor")
    logged = storage.SQLiteStorage.get_logs("athanor", name)
    config = storage.SQLiteStorage.get_run_config("athanor", name)
    config = {key: value for key, value in config.items() if key.startswith("part.")}
    assert_followed(Stored(name, config, [(each["step"], each) for each in logged]), workdir)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_mlflow_in_files(workdir, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(workdir.parent))
    again_after_a_kill(workdir, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("athanor").experiment_id])
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    stored = Stored("a run", run.data.params)
    for metric in ("reward", "completions/mean_length", "validation_reward"):
        history = client.get_metric_history(run.info.run_id, metric)
        stored.logged += [(each.step, {metric: each.value}) for each in history]
    assert_followed(stored, workdir)
