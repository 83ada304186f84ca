"""Runs the processes of a sweep, some at a time, and leaves none behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiment.sweep.runs import SweepRun

# Between asking a run to stop and killing it: time to finish writing a checkpoint.
GRACE_SECONDS = 30
# Recorded of a run that stops when it is asked to, with exit code 0: it is not finished.
STOPPED = 128 + signal.SIGTERM


class Running(NamedTuple):
    """A run whose process has started."""

    run: SweepRun
    process: subprocess.Popen
    began: float  # by time.monotonic()


def execute(runs: Sequence[SweepRun], parallel: int) -> None:
    """Runs what is not finished, `parallel` at a time, and records how each ended.

    It leaves no process behind, however it is left itself.
    """
    waiting = [run for run in runs if run.exit_code() != 0]
    if finished := len(runs) - len(waiting):
        print(f"{finished} of {len(runs)} runs finished before", flush=True)
    slots: dict[int, Running] = {}
    try:
        while waiting or slots:
            for slot in sorted(set(range(parallel)) - slots.keys()):
                if waiting:
                    run = waiting.pop(0)
                    print(f"start  {run.name}  (log: {run.log})", flush=True)
                    slots[slot] = Running(run, start(run, slot, parallel), time.monotonic())
            for slot, running in list(slots.items()):
                code = running.process.poll()
                if code is not None:
                    del slots[slot]
                    _record(running, code)
            time.sleep(0.1)
    finally:
        _stop([running.process for running in slots.values()])


def _record(running: Running, code: int) -> None:
    """Records and prints how a run ended."""
    run, seconds = running.run, time.monotonic() - running.began
    if code == 0 and run.lacks_steps():
        code = STOPPED
    run.write_exit_record(code, seconds)
    how = {0: "done ", STOPPED: "stopped before its end:"}.get(code, f"FAILED, exit {code}:")
    error = "" if code in (0, STOPPED) else f"  {run.last_log_line()}"
    print(f"{how}  {run.name}  ({seconds:.0f} s){error}", flush=True)


def start(run: SweepRun, slot: int, parallel: int) -> subprocess.Popen:
    """Starts a run with its slot's share of the devices of CUDA_VISIBLE_DEVICES.

    It is in a session of its own, so that Ctrl-C reaches the sweep alone, which then stops its runs
    in order.
    """
    run.workdir.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if devices := [device for device in visible.split(",") if device]:
        share = devices[slot::parallel] or [devices[slot % len(devices)]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    with run.log.open("a") as log:
        return subprocess.Popen(
            run.argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Asks the processes to stop, and kills those that have not after GRACE_SECONDS."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too slow, or Ctrl-C again
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
