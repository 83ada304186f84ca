"""Plans the runs of a sweep, all of them checked before any starts."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from experiment.config_files import ConfigSource, errors_in, load_config_module
from experiment.renamed import with_new_names
from experiment.schema import parse
from files import write_json


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, with all that is known before it starts."""

    name: str
    changes: Mapping[str, Any]  # "train.learning_rate" -> 1e-3
    # The whole config as JSON: a run is finished only with the very config that it would have now.
    config: Mapping[str, Any]
    argv: tuple[str, ...]  # the command line
    workdir: Path

    @property
    def log(self) -> Path:
        """The file that gets what the run prints."""
        return self.workdir / "sweep.log"

    def exit_record(self) -> dict[str, Any] | None:
        """Returns how the run with this config ended, None if it has not.

        It is {"exit": code, "seconds": wall time, "config": the config}.
        """
        try:
            record = json.loads((self.workdir / "sweep.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if with_new_names(record.get("config") or {}) == self.config else None

    def exit_code(self) -> int | None:
        """Returns the recorded exit code, None if the run has not ended."""
        return (self.exit_record() or {}).get("exit")

    def write_exit_record(self, code: int, seconds: float) -> None:
        """Records how the run ended."""
        record = {"exit": code, "seconds": round(seconds, 1), "config": self.config}
        write_json(self.workdir / "sweep.json", record)

    def lacks_steps(self) -> bool:
        """Tells whether its summary counts fewer steps than its config asks for."""
        steps = [
            number for name, number in self.results().items() if name.rpartition(".")[2] == "steps"
        ]
        return bool(steps) and max(steps) < self.config["train"]["steps"]

    def last_log_line(self) -> str:
        """Returns the last line of the log with words: of a command that failed, its error."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def results(self) -> dict[str, float]:
        """Returns the numbers of summary.json, nested names joined by dots; {} without one."""
        try:
            return _numbers(json.loads((self.workdir / "summary.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def plan_runs(source: ConfigSource, module: str, workdir: Path) -> tuple[str, list[SweepRun]]:
    """Returns the question of a sweep and its runs.

    Args:
      source: the config file, with a `sweep(add)` whose docstring is the question, and what is
        overridden in every run.
      module: what each run is, `python -m MODULE`.
      workdir: has a directory for each run.

    Raises:
      UserError: there is no run, one could not start, or two are the same.
    """
    config_module = load_config_module(source.path)
    if not hasattr(config_module, "sweep"):
        raise UserError(f"{source.path}: defines no sweep(add)")
    added: list[dict[str, Any]] = []
    with errors_in(source.path.partition(":")[0]):
        config_module.sweep(lambda changes: added.append(dict(changes)))
    if not added:
        raise UserError(f"{source.path}: sweep() adds no run")
    runs: list[SweepRun] = []
    for number, changes in enumerate(added, 1):
        where = f"{source.path}: run {number} of sweep()"
        run = _plan_run(source, module, workdir, changes, where)
        for earlier, other in enumerate(runs, 1):
            if run.config == other.config:
                raise UserError(f"{where}: the same as run {earlier}: {changes}")
        runs.append(run)
    return " ".join((config_module.sweep.__doc__ or "").split()), runs


def _plan_run(
    source: ConfigSource, module: str, workdir: Path, changes: dict[str, Any], where: str
) -> SweepRun:
    """Returns one run of a sweep: its validated config, its command and its workdir."""
    typed = {word.partition("=")[0].partition(".")[2] for word in source.overrides}
    if twice := typed & changes.keys():
        raise UserError(f"{where}: sets {min(twice)}, and so does the command line; drop one")
    overrides = tuple(f"--config.{field}={_as_text(value)}" for field, value in changes.items())
    directory = workdir / run_name(changes)
    try:
        config = parse(ConfigSource(source.path, source.overrides + overrides).read(directory))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    argv = (
        sys.executable,
        "-m",
        module,
        f"--config={source.path}",
        *source.overrides,
        *overrides,
        f"--workdir={directory}",
    )
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))
    return SweepRun(directory.name, changes, as_json, argv, directory)


def run_name(changes: Mapping[str, Any]) -> str:
    """Returns a directory's name that says what the run changes.

    It depends on nothing else, so that a sweep may grow without renaming its runs.
    """
    exact = ",".join(f"{field}={_as_text(value)}" for field, value in changes.items())
    exact = exact or "unchanged"
    safe = re.sub(r"[^\w.+=,-]+", "-", exact)[:180]  # file names end at 255 bytes
    return safe if safe == exact else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _as_text(value: Any) -> str:
    """Returns a value as a command line gives it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _numbers(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {
            name: number
            for key, item in value.items()
            for name, number in _numbers(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
