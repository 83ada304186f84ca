"""A sweep runs each experiment once, whatever happens in between, and shows what came out.

The experiments are a few lines of Python, not training.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import UserError
from experiment.config_files import ConfigSource
from experiment.sweep import processes
from experiment.sweep.runs import SweepRun, plan_runs, run_name
from experiment.sweep.seeds import OverSeeds
from launch import COMMANDS, sweep

pytestmark = pytest.mark.command

ROOT = Path(__file__).parents[2]

# Stands for launch.pretrain: appends a line to a file each time it starts, then does what the
# fields tell it to.
EXPERIMENT = """
import json, os, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with (workdir / "starts").open("a") as file:
    file.write(f"started {os.getpid()}\\n")
rate = float(flags.get("config.train.learning_rate", 0))
if rate == 2 and not pathlib.Path("repaired").exists():
    sys.exit("error: diverged")
while 3 <= rate < 4 and not pathlib.Path("repaired").exists():
    time.sleep(0.05)
steps = int(flags["config.train.steps"]) - (rate == 5 and not pathlib.Path("repaired").exists())
summary = {"pretrain": {"loss_last": 5 - rate, "text": "x", "on": True}, "steps": steps}
(workdir / "summary.json").write_text(json.dumps(summary))
"""

CONFIG = '''
from configs.base import get_config

def sweep(add):
    """Which rate
    is best?"""
    for rate in RATES:
        add({"train.learning_rate": rate})
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the experiment in it, where the sweep is run."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes/train.py").write_text(EXPERIMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(place, rates, body=CONFIG):
    (place / "x.py").write_text(body.replace("RATES", repr(rates)))
    return ConfigSource("x.py", ("--config.train.steps=7",))


def go(source, parallel=2, show=()):
    sweep.run(source, Path("runs"), command="fakes.train", parallel=parallel, show=show)


def starts(place, rate):
    return (place / f"runs/train.learning_rate={rate}/starts").read_text().count("started")


def test_runs_all_and_tables_the_results(place, capsys):
    go(write(place, (0.001, 1.0, 4)))
    out = capsys.readouterr().out
    assert out.index("Which rate is best?") < out.index("pretrain.loss_last")
    with (place / "runs/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [
        (row["train.learning_rate"], row["pretrain.loss_last"], row["steps"], row["exit"])
        for row in rows
    ] == [
        ("0.001", "4.999", "7", "0"),
        ("1.0", "4.0", "7", "0"),
        ("4", "1.0", "7", "0"),
    ]
    assert "pretrain.text" not in rows[0] and "pretrain.on" not in rows[0]
    page = (place / "runs/report.html").read_text()
    assert "Which rate is best?" in page and "<td>4.999</td>" in page
    assert "wrote runs/report.html" in out


def test_runs_of_several_seeds_come_to_a_mean_and_an_interval(place, capsys):
    """By hand: 1, 2 and 6 have a mean of 3 and a standard deviation of 2.646."""
    found = OverSeeds.of([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.high - 3 == pytest.approx(4.3027 * 2.6458 / 3**0.5, rel=1e-4)
    assert found.low == pytest.approx(6 - found.high)
    seeds = CONFIG.replace('add({"train.learning_rate": rate})', 'add({"seed": rate})')
    go(write(place, (3, 4), seeds.replace("rate})", "rate, 'train.warmup_steps': 9})")))
    out = capsys.readouterr().out
    assert "means over seeds" in out and "7 (7 to 7)" in out
    (means,) = json.loads((place / "runs/results.json").read_text())["over_seeds"]
    assert means["changes"] == {"train.warmup_steps": 9} and means["seeds"] == 2
    assert means["results"]["steps"] == {"mean": 7, "low": 7, "high": 7}


def test_show_chooses_the_columns(place, capsys):
    go(write(place, (1.0,)), show=("steps",))
    table = capsys.readouterr().out.split("Which rate is best?")[1]
    assert "steps" in table and "pretrain.loss_last" not in table
    with pytest.raises(
        UserError, match=r"--show=stpes: no run has it \(has: pretrain.loss_last, steps\)"
    ):
        go(write(place, (1.0,)), show=("stpes",))


def test_finished_runs_are_kept_and_failed_ones_go_again(place, capsys):
    source = write(place, (1.0, 2.0))
    with pytest.raises(UserError) as error:
        go(source)
    assert str(error.value) == (
        "1 of 2 runs failed or were stopped: train.learning_rate=2.0 "
        "(exit 1, log runs/train.learning_rate=2.0/sweep.log)"
    )
    failed = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if "FAILED, exit 1:  train.learning_rate=2.0" in line
    )
    assert failed.endswith("error: diverged")
    assert "error: diverged" in (place / "runs/train.learning_rate=2.0/sweep.log").read_text()
    (place / "repaired").touch()
    go(write(place, (1.0, 2.0, 4.0)))
    assert [starts(place, rate) for rate in (1.0, 2.0, 4.0)] == [1, 2, 1]
    assert "1 of 3 runs finished before" in capsys.readouterr().out


def test_a_run_that_was_stopped_well_goes_again(place, capsys):
    """A command that gets SIGTERM saves and exits with 0; its summary says that steps are
    missing.
    """
    with pytest.raises(
        UserError, match=r"1 of 2 runs failed or were stopped: train.learning_rate=5.0 \(exit 143, "
    ):
        go(write(place, (1.0, 5.0)))
    assert "stopped before its end:  train.learning_rate=5.0" in capsys.readouterr().out
    (place / "repaired").touch()
    go(write(place, (1.0, 5.0)))
    assert [starts(place, rate) for rate in (1.0, 5.0)] == [1, 2]


def test_a_run_finished_with_another_config_goes_again(place):
    source = write(place, (1.0,))
    go(source)
    go(source._replace(overrides=("--config.train.steps=8",)))
    assert starts(place, 1.0) == 2


@pytest.mark.parametrize("parallel", [1, 2])
def test_no_more_than_parallel_at_once(place, parallel, monkeypatch):
    alive, started = [], []
    start = processes.start

    def counted(run, slot, slots):
        started.append(start(run, slot, slots))
        alive.append(sum(process.poll() is None for process in started))
        if len(started) == parallel:
            (place / "repaired").touch()  # until here none can have ended
        return started[-1]

    monkeypatch.setattr(processes, "start", counted)
    go(write(place, (3.0, 3.25, 3.5)), parallel)
    assert max(alive) == parallel


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_sweep_stops_its_runs(place, stop):
    write(place, (3.0,))
    argv = [
        sys.executable,
        "-m",
        "launch.sweep",
        "--config=x.py",
        "--command=fakes.train",
        "--workdir=runs",
        "--config.train.steps=7",
    ]
    started = place / "runs/train.learning_rate=3.0/starts"
    # A shell's background jobs ignore SIGINT, and so does what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 300
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(stop)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + stop
    assert err == f"stopped by {signal.Signals(stop).name}; give the same command again\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text().split()[1]), 0)
    assert not (started.parent / "sweep.json").exists()


def test_slots_share_out_the_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    seen = []
    for slot, slots in ((0, 2), (1, 2), (3, 4)):
        argv = (sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
        run = SweepRun("x", {}, {}, argv, tmp_path / f"{slot}{slots}")
        processes.start(run, slot, slots).wait()
        seen.append(run.log.read_text().strip())
    assert seen == ["4,6", "5", "4"]  # a fourth slot shares with the first


# The body of sweep(add) -> the error.
BROKEN = {
    "": "x.py: defines no sweep(add)",
    "pass": "x.py: sweep() adds no run",
    "add({'train.rate': 1})": "x.py: run 1 of sweep(): config.train.rate: no such field",
    "add({'seed': 1}); add({'seed': 'x'})": (
        "x.py: run 2 of sweep(): config.seed = 'x': must be an int"
    ),
    "add({'seed': 1}); add({'seed': 2}); add({'seed': 1})": (
        "x.py: run 3 of sweep(): the same as run 1"
    ),
    "add({}); add({'seed': 0})": "x.py: run 2 of sweep(): the same as run 1",
    "add({'train.steps': 1})": (
        "x.py: run 1 of sweep(): sets train.steps, and so does the command line"
    ),
    "add({'model.moe.n_group': 3})": "x.py: run 1 of sweep(): model.moe.n_group = 3",
    "1 / 0": "x.py:3: ZeroDivisionError",
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_mistake_is_reported_before_anything_starts(place, body):
    sweep_function = f"def sweep(add):\n    {body}" if body else ""
    with pytest.raises(UserError) as error:
        go(write(place, (), f"from configs.base import get_config\n{sweep_function}"))
    assert str(error.value).startswith(BROKEN[body])
    assert not (place / "runs").exists()


def test_an_unknown_command_is_named(place):
    match = r"--command=sample_: no such command \(did you mean sample\?\)"
    with pytest.raises(UserError, match=match):
        sweep.run(write(place, (1.0,)), Path("runs"), command="sample_", parallel=1, show=())


def test_every_command_can_be_swept():
    """The list of commands is that of the modules, so that none is forgotten."""
    modules = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "__main__"}
    assert set(COMMANDS) == modules
    assert {sweep.module_of(name) for name in COMMANDS} == {f"launch.{name}" for name in modules}


def test_names_are_readable_stable_and_apart():
    changes = {
        "train.learning_rate": 1e-3,
        "model.mla.gate": "element",
        "model.tie_word_embeddings": True,
    }
    assert run_name(changes) == (
        "train.learning_rate=0.001,model.mla.gate=element,model.tie_word_embeddings=true"
    )
    assert run_name({}) == "unchanged"
    a, b = (run_name({"data.sources": (f"text:{glob}",)}) for glob in ("a/*.py", "a?*.py"))
    assert a != b and not set(a + b) & set("/*'() ")
    long = run_name({"data.sources": ("x" * 300,)})
    assert len(long) < 255 and json.dumps(long) == f'"{long}"' and os.sep not in long


def test_the_sweep_of_the_readme_needs_no_other_run(tmp_path):
    """Its runs differ in shape, so no checkpoint would fit them all."""
    source = ConfigSource(str(ROOT / "configs/gate_sweep.py"), ())
    question, runs = plan_runs(source, "launch.pretrain", tmp_path)
    assert question and len(runs) == 6 and {run.config["init_from"] for run in runs} == {""}


def test_indexers_that_learn_and_that_stay_are_compared_in_three_seeds(tmp_path):
    source = ConfigSource(str(ROOT / "configs/indexer_sweep.py"), ("--config.init_from=",))
    _, runs = plan_runs(source, "launch.reinforce", tmp_path)
    found = {(run.config["reinforce"]["indexer"], run.config["seed"]) for run in runs}
    assert found == {(indexer, seed) for indexer in ("trained", "frozen") for seed in (0, 1, 2)}
    assert all(run.config["train"]["indexer_weight"] > 0 for run in runs), "or none would learn"
