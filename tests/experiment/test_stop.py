"""Every command that is asked to stop ends soon, with the code of the signal and one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_address

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.command
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(name: str, workdir: Path, **environment: str) -> subprocess.Popen:
    """Starts a command of commands.py."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiment.commands", name, str(workdir)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(name: str, workdir: Path) -> list[subprocess.Popen]:
    address = free_address()
    return [start(name, workdir, ATHANOR_DISTRIBUTED=f"{address},{i},2") for i in range(2)]


def wait_until_begun(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    assert "begun\n" in iter(process.stdout.readline, ""), process.communicate()


def ends(process: subprocess.Popen, seconds: float) -> tuple[int, list[str]]:
    """Waits; returns the exit code and the lines on stderr."""
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < seconds
    return process.returncode, err.splitlines()


@pytest.mark.parametrize("name", ["sleeps", "computes", "trains"])
@pytest.mark.parametrize("number", CODES)
def test_a_command_ends_with_the_code_of_the_signal_and_a_line(name, number, tmp_path):
    process = start(name, tmp_path)
    wait_until_begun(process)
    process.send_signal(number)
    code, lines = ends(process, 10)
    assert code == CODES[number]
    (line,) = lines
    assert line.startswith(f"stopped by {number.name}; ")
    if name == "trains":
        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        assert line.endswith(f"; the same command goes on from step {checkpoint.name}")


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("name", ["collects", "trains"])
def test_a_signal_to_one_of_two_processes_ends_both(name, number, tmp_path):
    """JAX itself would swallow SIGTERM in what does not poll."""
    processes = start_two(name, tmp_path)
    for process in processes:
        wait_until_begun(process)
    processes[1].send_signal(number)
    (first, first_lines), (second, second_lines) = (ends(process, 15) for process in processes)
    assert second == CODES[number]
    if name == "trains":
        assert first == 143 and "goes on from step" in first_lines[-1]
        assert [path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()] == [True]
    else:
        assert second_lines[-1].startswith(f"stopped by {number.name}; ")
        assert first == 2 and "error: process 1 (host " in "".join(first_lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collects", "fails_in_one"])
def test_where_one_of_two_processes_is_gone_the_other_says_which(name, tmp_path):
    processes = start_two(name, tmp_path)
    if name == "collects":
        for process in processes:
            wait_until_begun(process)
        processes[1].kill()
    (first, lines), (second, own) = (ends(process, 60) for process in processes)
    assert first == 2
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: process 1 (host {os.uname().nodename}, process id {processes[1].pid}) of this run "
        "has ended; the same command goes on from the newest checkpoint"
    ]
    assert not any("Traceback" in line or "*** " in line for line in lines)
    if name == "fails_in_one":
        assert (second, own[-1]) == (2, "error: its disk is full")


@pytest.mark.parametrize("words", ["launch --help", "launch.pretrain --help", "launch.fields"])
def test_whoever_reads_the_output_may_go_away(words):
    """As `head` does. The error is Python's when it flushes, so nothing is read at all."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", *words.split()]
    done = subprocess.run(argv, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
