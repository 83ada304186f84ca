"""One run writes to a workdir at a time, and a run that died keeps nobody out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from errors import UserError
from experiment import lock
from experiment.lock import LOCK, is_alive, locked, this_process

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from experiment.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_is_held_and_released(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "run"):
            owner = json.loads((tmp_path / "run" / LOCK).read_text())
            assert owner["pid"] == os.getpid() and is_alive(owner)
            with pytest.raises(UserError, match=rf"run: another run .*process {os.getpid()}\)"):
                locked(tmp_path / "run").__enter__()
        assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.command
def test_a_second_writer_is_refused_at_once_until_the_first_is_dead(tmp_path, holder):
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"{tmp_path}: another run writes there \(host "),
        locked(tmp_path),
    ):
        pass
    assert time.monotonic() - began < 1
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("left", ["", "{", "[]", "{}", '{"host": "h", "pid": 1'])
def test_a_lock_that_cannot_be_read_is_stale(left, tmp_path, monkeypatch):
    """Its writer died while it wrote it."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (tmp_path / LOCK).write_text(left)
    with locked(tmp_path):
        pass


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    owner = this_process() | {"started": "1"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    assert is_alive(owner) is False
    with locked(tmp_path):
        pass


def test_another_machine_is_dead_when_it_no_longer_touches_its_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "TAKE_OVER_SECONDS", 1)
    (tmp_path / LOCK).write_text(json.dumps(this_process() | {"machine": "x", "host": "far"}))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "host far" in capsys.readouterr().err


def test_another_machine_lives_while_it_touches_its_lock_even_with_a_wrong_clock(
    tmp_path, monkeypatch
):
    file = tmp_path / LOCK
    file.write_text(json.dumps(this_process() | {"machine": "x", "host": "far"}))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    timer = threading.Timer(0.5, lambda: os.utime(file, (1, 1)))  # 1970
    timer.start()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"another run writes there \(host far"), locked(tmp_path):
        pass
    assert time.monotonic() - began < 5  # as soon as it is touched
    assert file.exists()
    timer.join()


def test_of_many_that_take_over_one_wins(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(this_process() | {"pid": 2**22 + 1}))
    taken, held = [], []

    def take():
        try:
            held.append(lock._Lock(tmp_path / LOCK))
            taken.append(1)
        except UserError:
            taken.append(0)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [0] * 15 + [1]
    held[0].release()
    assert os.listdir(tmp_path) == []


def test_where_no_lock_can_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"lock.json: cannot write: "), locked(tmp_path / "file"):
        pass
