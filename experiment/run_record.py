"""What made a run: its commands, the commit they ran from, and what its config changes.

`run.json` in a workdir has an entry for each start of the run.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiment.schema import default_config
from experiment.workdir import recorded_config
from files import write_json
from model.config import ModelConfig
from report.results import Origin
from train.state import count_parameters

RECORD = "run.json"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CHECKOUT = Path(__file__).parents[1]


def record_start(workdir: Path, model: ModelConfig) -> None:
    """Adds to run.json what starts a run in `workdir` at this moment, on process 0 alone.

    Starts before the first step, which left nothing behind, are forgotten.

    Raises:
      UserError: the file cannot be written.
    """
    if jax.process_index() != 0:
        return
    metrics = workdir / "metrics.jsonl"
    before = _starts(workdir) if metrics.exists() and metrics.stat().st_size else []
    start = {
        "time": round(time.time(), 3),
        "command": command_line(),
        "commit": commit(),
        "parameters": count_parameters(model)[0],
        "devices": devices(),
        "versions": versions(),
    }
    write_json(workdir / RECORD, {"starts": [*before, start]})


def origin_of(workdir: Path) -> Origin | None:
    """Returns what a workdir records of its run; None of a directory without config.json.

    Raises:
      UserError: config.json is damaged.
    """
    if not (workdir / "config.json").exists():
        return None
    config: Any = recorded_config(workdir)
    command = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["command"]
    sources = [config.reinforce.task] if command == "reinforce" else list(config.data.sources)
    return Origin(
        command,
        config.seed,
        config.init_from,
        config.train.stage,
        sources,
        config.train.steps,
        changed_fields(config),
        _starts(workdir),
    )


def changed_fields(config: Any) -> dict[str, Any]:
    """Returns the fields of a ConfigDict whose values are not the defaults, by dotted name.

    seed and init_from are left out: a run shows them by themselves.
    """
    ours, defaults = _flat(config), _flat(default_config())
    return {
        name: value
        for name, value in ours.items()
        if name not in ("seed", "init_from") and defaults.get(name) != value
    }


def command_line() -> str:
    """Returns the command that runs here, as a person would type it in a shell."""
    interpreter, *words = sys.orig_argv
    if words[:1] != ["-m"] and words and Path(words[0]).name == "athanor":
        return shlex.join(["athanor", *words[1:]])
    return shlex.join([Path(interpreter).name, *words])


def commit() -> str:
    """Returns the commit of the checkout that this code is in; "" where it is installed elsewhere.

    A checkout with changes that are not committed says so.
    """
    if not (CHECKOUT / ".git").exists():
        return ""
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") if revision else ""
    return f"{revision}, with uncommitted changes" if changed else revision


def devices() -> list[str]:
    """Returns the kind of each device, such as "cpu:cpu"."""
    return [f"{device.platform}:{device.device_kind}" for device in jax.devices()]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _git(*words: str) -> str:
    """Returns what git prints; "" where there is no git, or it refuses."""
    try:
        command = ["git", "-C", str(CHECKOUT), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _starts(workdir: Path) -> list[Mapping[str, Any]]:
    """Returns the starts that run.json has; [] without one, or of one that is damaged.

    It is told for people alone: nothing depends on it, so a damaged one stops no run.
    """
    try:
        starts = json.loads((workdir / RECORD).read_text(encoding="utf-8"))["starts"]
        return [start for start in starts if isinstance(start, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _flat(section: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of nested sections by dotted name; a field that is a mapping is one."""
    flat = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, ConfigDict) else {path: value}
    return flat
