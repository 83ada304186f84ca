"""Runs every experiment of a config's sweep() and prints one table of what came out.

    python -m launch.sweep --config=configs/x.py --command=pretrain --workdir=runs/sweep
    --parallel=2 python -m launch.sweep --config=configs/x.py --command=pretrain
    --workdir=runs/sweep --show=pretrain.loss_last --config.train.steps=100

The config file says what to run: `def sweep(add)` with its question as docstring calls
`add({"train.learning_rate": 1e-3})` once a run. Each run is `python -m launch.COMMAND` with its own
directory below --workdir, log in sweep.log. Give the same command again to go on: finished runs are
kept. With CUDA_VISIBLE_DEVICES set, the runs that go on at once share the devices out among them.
"""

import contextlib
import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import Source, errors_in, load_config_module
from experiment.schema import parse

GRACE_SECONDS = (
    30  # between asking a run to stop and killing it: time to finish writing a checkpoint
)
STOPPED = (
    128 + signal.SIGTERM
)  # recorded of a run that was asked to stop, and did so well, with exit code 0: it is not finished
COLUMNS_SHOWN = 8  # without --show; results.csv has them all


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a sweep, with all that is known before it starts."""

    name: str
    changes: Mapping[str, Any]  # "train.learning_rate" -> 1e-3
    config: Mapping[
        str, Any
    ]  # all of it, as JSON: a run is finished only with the very config it would have now
    words: tuple[str, ...]  # the command line
    workdir: Path

    @property
    def log(self) -> Path:
        return self.workdir / "sweep.log"

    def ended(self) -> dict[str, Any] | None:
        """How the run with this config ended: {"exit", "seconds", "config"}, or None if it has
        not.
        """
        try:
            ended = json.loads((self.workdir / "sweep.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return ended if ended.get("config") == self.config else None

    def finished(self) -> bool:
        return (self.ended() or {}).get("exit") == 0

    def stopped_short(self) -> bool:
        """Whether its summary counts fewer steps than it was to have."""
        steps = [
            number for name, number in self.results().items() if name.rpartition(".")[2] == "steps"
        ]
        return bool(steps) and max(steps) < self.config["train"]["steps"]

    def record(self, code: int, seconds: float) -> None:
        _write(
            self.workdir / "sweep.json",
            json.dumps({"exit": code, "seconds": round(seconds, 1), "config": self.config}) + "\n",
        )

    def last_words(self) -> str:
        """The last line of the log: of a command that failed, its error."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def results(self) -> dict[str, float]:
        """The numbers of summary.json, nested names joined by dots; none if the command wrote
        none.
        """
        try:
            return _numbers(json.loads((self.workdir / "summary.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def plan(source: Source, command_name: str, workdir: Path) -> tuple[str, list[Run]]:
    """The question and the runs of a sweep, all of them checked. Raises UserError for any that
    could not start, and for two that are the same.
    """
    module = load_config_module(source.path)
    if not hasattr(module, "sweep"):
        raise UserError(f"{source.path}: defines no sweep(add)")
    added: list[dict[str, Any]] = []
    with errors_in(source.path.partition(":")[0]):
        module.sweep(lambda changes: added.append(dict(changes)))
    if not added:
        raise UserError(f"{source.path}: sweep() adds no run")
    typed = {word.partition("=")[0].partition(".")[2] for word in source.overrides}
    runs, seen = [], {}
    for number, changes in enumerate(added, 1):
        where = f"{source.path}: run {number} of sweep()"
        if twice := typed & changes.keys():
            raise UserError(f"{where}: sets {min(twice)}, and so does the command line; drop one")
        words = tuple(f"--config.{field}={_word(value)}" for field, value in changes.items())
        try:
            config = parse(Source(source.path, source.overrides + words).read())
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if config in seen:
            raise UserError(f"{where}: the same as run {seen[config]}: {changes}")
        seen[config] = number
        place = workdir / run_name(changes)
        argv = (
            sys.executable,
            "-m",
            _module(command_name),
            f"--config={source.path}",
            *source.overrides,
            *words,
            f"--workdir={place}",
        )
        runs.append(
            Run(
                place.name, changes, json.loads(json.dumps(dataclasses.asdict(config))), argv, place
            )
        )
    return " ".join((module.sweep.__doc__ or "").split()), runs


def run_name(changes: Mapping[str, Any]) -> str:
    """A directory's name that says what the run changes. It depends on nothing else, so that a
    sweep may grow without renaming its runs.
    """
    exact = ",".join(f"{field}={_word(value)}" for field, value in changes.items()) or "unchanged"
    safe = re.sub(r"[^\w.+=,-]+", "-", exact)[:180]  # file names end at 255 bytes
    return safe if safe == exact else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _word(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else value
        if isinstance(value, str)
        else repr(value)
    )


def _module(command_name: str) -> str:
    """`pretrain` is launch.pretrain; a name with a dot is a module of your own."""
    module = command_name if "." in command_name else f"launch.{command_name}"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        there = sorted(
            path.stem
            for path in Path(__file__).parent.glob("*.py")
            if "\n    command(" in path.read_text()
        )
        nearest = difflib.get_close_matches(command_name, there, n=1)
        raise UserError(
            f"--command={command_name}: no such command ({f'did you mean {nearest[0]}?' if nearest else 'there is ' + ', '.join(there)})"
        )
    return module


def execute(runs: Sequence[Run], parallel: int) -> None:
    """Runs what is not finished, `parallel` at a time, and records how each ended. Leaves no
    process behind, however it is left itself.
    """
    waiting = [run for run in runs if not run.finished()]
    if kept := len(runs) - len(waiting):
        print(f"{kept} of {len(runs)} runs finished before", flush=True)
    going: dict[int, tuple[Run, subprocess.Popen, float]] = {}
    try:
        while waiting or going:
            for slot in sorted(set(range(parallel)) - going.keys()):
                if waiting:
                    run = waiting.pop(0)
                    print(f"start  {run.name}  (log: {run.log})", flush=True)
                    going[slot] = run, _start(run, slot, parallel), time.monotonic()
            for slot, (run, process, began) in list(going.items()):
                if (code := process.poll()) is not None:
                    del going[slot]
                    if code == 0 and run.stopped_short():
                        code = STOPPED
                    run.record(code, time.monotonic() - began)
                    how = {0: "done ", STOPPED: "stopped before its end:"}.get(
                        code, f"FAILED, exit {code}:"
                    )
                    last = "" if code in (0, STOPPED) else f"  {run.last_words()}"
                    print(
                        f"{how}  {run.name}  ({time.monotonic() - began:.0f} s){last}", flush=True
                    )
            time.sleep(0.1)
    finally:
        _stop([process for _, process, _ in going.values()])


def _start(run: Run, slot: int, parallel: int) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C reaches the sweep alone, which then stops its runs in
    order.
    """
    run.workdir.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if devices := [
        device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device
    ]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(
            devices[slot::parallel] or [devices[slot % len(devices)]]
        )
    with run.log.open("a") as log:
        return subprocess.Popen(
            run.words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
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


def report(question: str, runs: Sequence[Run], workdir: Path, show: Sequence[str]) -> None:
    """Prints the table, writes results.csv. Raises UserError naming the runs that failed, or a
    column of `show` that no run has.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    changed = list(dict.fromkeys(field for run in runs for field in run.changes))
    results = {run.name: run.results() for run in runs}
    every = list(dict.fromkeys(name for values in results.values() for name in values))
    codes = {run.name: (run.ended() or {}).get("exit") for run in runs}

    rows = [["run", "exit", "seconds", *changed, *every]]
    for run in runs:
        seconds = (run.ended() or {}).get("seconds")
        rows.append(
            [
                run.name,
                codes[run.name],
                seconds,
                *(run.changes.get(field) for field in changed),
                *(results[run.name].get(name) for name in every),
            ]
        )
    _write(workdir / "results.csv", rows)

    common = [
        name
        for name in every
        if all(name in results[run.name] for run in runs if codes[run.name] == 0)
    ]
    columns = list(show) or common[:COLUMNS_SHOWN]
    table = Table(*changed, *columns, "exit", box=box.SIMPLE_HEAD)
    for run in runs:
        values = [
            f"{results[run.name][name]:.5g}" if name in results[run.name] else "-"
            for name in columns
        ]
        table.add_row(
            *(str(run.changes.get(field, "")) for field in changed), *values, str(codes[run.name])
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=4_000)  # a file has no edge to wrap at
    print(
        f"\n{question or 'sweep'}", flush=True
    )  # not as rich's title, which wraps at the width of the table
    console.print(table)
    more = (
        f" ({len(common) - len(columns)} more columns there; choose with --show=NAME)"
        if not show and len(common) > len(columns)
        else ""
    )
    print(f"{workdir / 'results.csv'}{more}", flush=True)

    if failed := [
        f"{run.name} (exit {codes[run.name]}, log {run.log})"
        for run in runs
        if codes[run.name] != 0
    ]:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed or were stopped: {', '.join(failed)}"
        )
    if missing := [name for name in show if name not in every]:
        raise UserError(
            f"--show={missing[0]}: no run has it (has: {', '.join(every) or 'no summary.json'})"
        )


def _numbers(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {
            name: number
            for key, item in value.items()
            for name, number in _numbers(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def _write(path: Path, content: str | list[list[Any]]) -> None:
    """Text, or rows of CSV: whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with unfinished.open("w", newline="") as file:
        if isinstance(content, str):
            file.write(content)
        else:
            csv.writer(file).writerows(content)
    os.replace(unfinished, path)


def run(
    config: Source, workdir: Path, *, command: str, parallel: int, show: tuple[str, ...]
) -> None:
    if not command:
        raise UserError("--command is missing: what each run is, such as --command=pretrain")
    if parallel < 1:
        raise UserError(f"--parallel={parallel}: must be positive")
    question, runs = plan(config, command, workdir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    execute(runs, parallel)
    report(question, runs, workdir, show)


if __name__ == "__main__":
    command(
        run,
        config="source",
        flags={
            "command": Flag(
                "",
                "what each run is: pretrain, finetune, reinforce, ..., or a module of your own with a dot in its name",
            ),
            "parallel": Flag(1, "runs at a time"),
            "show": Flag(
                (),
                "a column of the table, such as pretrain.loss_last; without it those that all runs have",
            ),
        },
    )
