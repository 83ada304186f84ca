"""Trackers get each line of metrics.jsonl once, whatever becomes of the run, or of them."""

import json
import sys
import threading
import time
from typing import ClassVar

import jax
import pytest

from configs import base
from errors import UserError
from experiment.config_files import with_overrides
from experiment.schema import parse
from files import write_json
from tests.train.tracker_doubles import FAKES, Stored
from train import sinks, trackers
from train.metrics import Metrics, read_metrics
from train.trackers import Started, check_installed

CONFIG = {
    "command": "pretrain",
    "config": {"train": {"steps": 9, "sinks": ["wandb"]}, "seed": 3, "empty": {}},
}
FLAT = {"train.steps": 9, "train.sinks": ["wandb"], "seed": 3, "empty": {}}


class Recorder:
    """A tracker that keeps what it is told; what a test sets makes it slow, or fail."""

    runs: ClassVar[dict[str, Stored]] = {}
    fails_at: ClassVar[float] = 1e9  # from this step on
    fails_to_begin: ClassVar[bool] = False
    goes_on: ClassVar[threading.Event] = threading.Event()
    knows: ClassVar[int | None] = None

    def __init__(self, run: Started):
        if self.fails_to_begin:
            raise ConnectionError("no route\nto the tracker")
        self.id, self.last = run.id or f"id {len(self.runs)}", self.knows
        self.run = self.runs.setdefault(self.id, Stored(run.name, dict(run.config)))
        self.run.asked["phase"] = run.phase

    def log(self, step, values, when):
        assert self.goes_on.wait(60)
        if step >= self.fails_at:
            raise OSError("the network is gone")
        assert abs(when - time.time()) < 60
        self.run.logged.append((step, dict(values)))

    def close(self, *, failed):
        self.run.ended.append(failed)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(sinks, "TRACKERS", {"recorder": Recorder})
    for name, value in (
        ("runs", {}), ("fails_at", 1e9), ("fails_to_begin", False), ("knows", None),
    ):  # fmt: skip
        monkeypatch.setattr(Recorder, name, value)
    Recorder.goes_on.set()
    yield Recorder
    Recorder.goes_on.set()


def train(workdir, first, last, names=("recorder",), at=None) -> Metrics:
    """Logs steps, and after each second one a validation; leaves the run as a kill does."""
    metrics = Metrics(workdir, "pretrain", first - 1 if at is None else at, sinks=names)
    for step in range(first, last + 1):
        metrics.write(
            step, {"loss": step / 2, "load": [1.0, 2.0], "note": "x", "bad": jax.numpy.nan}
        )
        if step % 2 == 0:
            metrics.write(step, {"validation_lm": step / 4})
    return metrics


def killed(metrics: Metrics) -> None:
    """Leaves a run as a kill does, once all that it wrote has been sent."""
    *_, last = read_metrics(metrics.path)
    number = [line["step"] for line in read_metrics(metrics.path)].count(last["step"])
    path, until = metrics.path.parent / "sinks" / "recorder.json", time.monotonic() + 30
    while True:
        noted = json.loads(path.read_text())["pretrain"]
        if (noted["step"], noted["number"]) >= (last["step"], number):
            break
        assert time.monotonic() < until
        time.sleep(0.005)
    assert metrics._file
    metrics._file.close()
    metrics._events.close()


def lines_of(workdir, metric: str) -> list[tuple[int, float]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [(line["step"], line[metric]) for line in lines if metric in line]


def assert_followed(stored: Stored, workdir) -> None:
    """The tracker has what metrics.jsonl has, each line once and in order."""
    for metric in ("loss", "validation_lm"):
        assert stored.of(metric) == lines_of(workdir, metric)
    assert {name for _, values in stored.logged for name in values} == {"loss", "validation_lm"}


def test_a_tracker_gets_each_scalar_with_its_step_and_the_run_with_its_config(tmp_path, recorder):
    write_json(tmp_path / "config.json", CONFIG)
    with Metrics(tmp_path, "reinforce", resume_step=0):
        pass  # another phase's
    train(tmp_path, 1, 4).close()
    (stored,) = recorder.runs.values()
    assert_followed(stored, tmp_path)
    assert stored.name == tmp_path.name and stored.config == FLAT and stored.ended == [False]
    assert stored.asked["phase"] == "pretrain"


def test_a_run_that_goes_on_after_a_kill_sends_nothing_twice_and_leaves_nothing_out(
    tmp_path, recorder
):
    """Killed at step 7, and again at 5 when it goes on from 4; then from the checkpoint of 4."""
    for first, last in ((1, 7), (5, 5)):
        killed(train(tmp_path, first, last))
    train(tmp_path, 5, 10).close()
    assert list(recorder.runs) == ["id 0"]
    assert_followed(recorder.runs["id 0"], tmp_path)


def test_what_a_tracker_has_lost_with_a_run_is_sent_again(tmp_path, recorder, monkeypatch):
    killed(train(tmp_path, 1, 6))
    recorder.runs["id 0"].logged = [each for each in recorder.runs["id 0"].logged if each[0] <= 3]
    monkeypatch.setattr(Recorder, "knows", 3)
    train(tmp_path, 5, 8).close()
    assert_followed(recorder.runs["id 0"], tmp_path)


def test_a_tracker_that_is_asked_for_later_gets_what_was_before(tmp_path, recorder):
    train(tmp_path, 1, 4, names=()).close()
    train(tmp_path, 5, 6).close()
    assert_followed(recorder.runs["id 0"], tmp_path)


def test_a_tracker_that_fails_costs_one_line_and_catches_up(tmp_path, recorder, monkeypatch, capfd):
    monkeypatch.setattr(Recorder, "fails_at", 3)
    metrics = train(tmp_path, 1, 6)
    metrics.close()
    errors = capfd.readouterr().err
    assert errors == (
        "warning: train.sinks: recorder gets no more of this run: OSError: the network is gone; "
        "metrics.jsonl goes on, and the next start sends what is missing\n"
    )
    assert lines_of(tmp_path, "loss")[-1] == (6, 3.0)
    assert recorder.runs["id 0"].of("loss") == [(1, 0.5), (2, 1.0)]
    monkeypatch.setattr(Recorder, "fails_at", 1e9)
    train(tmp_path, 7, 8).close()
    assert_followed(recorder.runs["id 0"], tmp_path)


def test_a_tracker_that_cannot_begin_stops_a_new_run_alone(tmp_path, recorder, monkeypatch, capfd):
    monkeypatch.setattr(Recorder, "fails_to_begin", True)
    with pytest.raises(UserError, match=r"^train.sinks: recorder cannot begin: .* no route to"):
        train(tmp_path, 1, 2)
    monkeypatch.setattr(Recorder, "fails_to_begin", False)
    train(tmp_path, 1, 2).close()
    monkeypatch.setattr(Recorder, "fails_to_begin", True)
    train(tmp_path, 3, 4).close()
    assert capfd.readouterr().err.count("\n") == 1
    assert lines_of(tmp_path, "loss")[-1] == (4, 2.0)
    monkeypatch.setattr(Recorder, "fails_to_begin", False)
    train(tmp_path, 5, 5).close()
    assert_followed(recorder.runs["id 0"], tmp_path)


def test_a_slow_tracker_holds_nothing_up_and_is_waited_for_a_while(
    tmp_path, recorder, monkeypatch, capfd
):
    recorder.goes_on.clear()
    metrics = train(tmp_path, 1, 50)
    assert lines_of(tmp_path, "loss")[-1] == (50, 25.0) and not recorder.runs["id 0"].logged
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    metrics.close()
    assert "lines are not sent after 0 s" in capfd.readouterr().err
    recorder.goes_on.set()
    monkeypatch.setattr(sinks, "PATIENCE", 60.0)
    monkeypatch.setattr(sinks, "WAITING", 4)
    recorder.goes_on.clear()
    metrics = train(tmp_path, 51, 99)
    assert "more slowly than they come" in capfd.readouterr().err
    recorder.goes_on.set()
    metrics.close()


def test_an_error_ends_the_run_of_the_tracker_as_failed(tmp_path, recorder):
    with (
        pytest.raises(ZeroDivisionError),
        Metrics(tmp_path, "x", 0, ("recorder",)) as metrics,
    ):
        metrics.write(1, {"loss": 1 / 0})
    assert recorder.runs["id 0"].ended == [True]


def test_the_first_process_alone_has_trackers(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(tmp_path, 1, 2).close()
    assert not recorder.runs and not (tmp_path / "sinks").exists()
    check_installed(["no_such_package"])


def test_a_package_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    check_installed(["mlflow", "trackio"])
    with pytest.raises(
        UserError, match=r"^train.sinks: wandb is not installed; pip install wandb$"
    ):
        check_installed(["mlflow", "wandb"])


@pytest.mark.parametrize(
    "word, expected",
    [("wandb", ("wandb",)), ("('wandb','mlflow')", ("wandb", "mlflow")), ("()", ())],
)
def test_the_command_line_names_them(word, expected):
    config = with_overrides(base.get_config(), [f"--config.train.sinks={word}"])
    assert parse(config).train.sinks == expected


@pytest.mark.parametrize(
    "word, message",
    [
        (
            "comet",
            r"train.sinks = \('comet',\): must be a tuple of wandb, trackio, mlflow",
        ),
        ("wandb,mlflow", r"must be a tuple of .*, such as \('wandb', 'mlflow'\)"),
        ("('wandb','wandb')", "has one of them twice"),
    ],
)
def test_a_name_that_is_none_is_one_line(word, message):
    with pytest.raises(UserError, match=message):
        parse(with_overrides(base.get_config(), [f"--config.train.sinks={word}"]))


def test_the_trackers_are_those_that_there_are_doubles_of():
    assert trackers.TRACKERS.keys() == FAKES.keys()
