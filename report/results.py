"""Reads what a run, or each phase of a run, left in its workdir."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from files import read_json
from train.metrics import read_metrics

# In the order in which they run.
PHASES = ("copying", "pretrain", "warmup", "sparse", "finetune", "reinforce")

PhaseMetrics = Mapping[str, list[dict[str, Any]]]  # phase -> the lines of its metrics.jsonl
Summary = Mapping[str, Any]
Sample = Mapping[str, Any]


def read_phases(workdir: Path) -> PhaseMetrics:
    """Returns the metrics of a workdir by phase, in the order in which the phases ran.

    The workdir is that of one phase, or has a directory for each of its phases.

    Raises:
      UserError: a line is no JSON object.
    """
    phases: dict[str, list[dict[str, Any]]] = {}
    for directory in (workdir, *(workdir / phase for phase in PHASES)):
        if (directory / "metrics.jsonl").is_file():
            for line in read_metrics(directory / "metrics.jsonl"):
                phase = line["stage"] if directory == workdir else directory.name
                phases.setdefault(phase, []).append(line)
    return phases


def read_summary(workdir: Path) -> Summary:
    """Returns the numbers of summary.json, {} without one. Raises UserError if they are no JSON."""
    path = workdir / "summary.json"
    return read_json(path) if path.is_file() else {}


def read_samples(path: Path) -> list[Sample]:
    """Returns the first completion of each problem in a samples.jsonl, in order; [] without one.

    Raises:
      UserError: a line is no sample.
    """
    if not path.is_file():
        return []
    first: dict[str, Sample] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            first.setdefault(sample["prompt"], sample | {"completion": str(sample["completion"])})
        except (ValueError, TypeError, KeyError) as failure:
            raise UserError(
                f'{path}:{number}: not a sample; a line has "prompt", "completion", "reward" and '
                '"answer"'
            ) from failure
    return list(first.values())
