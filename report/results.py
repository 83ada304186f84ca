"""Reads what a run, or each phase of a run, left in its workdir.

What cannot be read is left out and noted, so that one damaged line costs no report.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from report.lenient import mapping, number, read_object, read_records
from train.metric_names import by_present_names

HELD_OUT, TRAINING = "held-out problems", "problems that it trains on"
# What is measured on problems -> the file that has it.
FILES = {
    "evaluation": "evaluation.json",
    "comparison": "comparison.json",
    "perplexity": "perplexity.json",
    "scaling": "scaling.json",
}
# In the order in which they run.
PHASES = ("pretrain", "warmup", "sparse", "finetune", "reinforce")

PhaseMetrics = Mapping[str, list[dict[str, Any]]]  # phase -> the lines of its metrics.jsonl
Summary = Mapping[str, Any]
Sample = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the numbers of a phase come from, as its workdir records it.

    Attributes:
      command: of launch/, such as "pretrain".
      changes: config field -> its value, where that is not the default of configs/base.py.
      sources: what it is trained on, as its config names it.
      steps: that the config asks for.
      starts: of the run, each {"time", "command", "commit", "parameters", "devices", "versions"};
        [] of a run that recorded none.
    """

    command: str = ""
    seed: int | None = None
    init_from: str = ""
    stage: str = ""
    sources: Sequence[str] = ()
    steps: int = 0
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a report shows of one run.

    Attributes:
      name: on the page.
      phases: the metrics of each phase, in the order in which they ran.
      origins: phase -> where its numbers come from; a phase without a record has none.
      samples: "before" and "after" reinforcement, or "" -> the first completion of each problem.
      traces: completions of the training of the policy, with their "step".
      infills: gaps of held-out documents, and what the model writes there.
      notes: what was left out.
      measured: contents of the files of `FILES`, by name.
    """

    name: str
    workdir: Path
    phases: PhaseMetrics
    origins: Mapping[str, Origin]
    summary: Summary
    samples: Mapping[str, Sequence[Sample]]
    traces: Sequence[Sample]
    infills: Sequence[Sample]
    notes: Sequence[str]
    measured: Mapping[str, Summary] = dataclasses.field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        shown = (self.phases, self.summary, self.traces, self.infills, *self.samples.values())
        return not any((*shown, *self.measured.values()))


def read_run(
    workdir: Path, read_origin: Callable[[Path], Origin | None], name: str | None = None
) -> Run:
    """Reads a workdir: that of one phase, or with a directory for each of its phases.

    Args:
      read_origin: reads what a directory records of its run, None if that is nothing; may raise
        UserError, which becomes a note.
      name: of the run; by default that of its directory.
    """
    notes: list[str] = []
    summary = read_object(workdir / "summary.json", notes)
    directories = phase_directories(workdir, summary)
    phases, origins = {}, {}
    for directory in (workdir, *directories):
        records = read_records(directory / "metrics.jsonl", _is_metrics, "line of metrics", notes)
        found: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            phase = str(record["stage"]) if directory == workdir else directory.name
            found.setdefault(phase, []).append(by_present_names(record))
        phases |= {phase: in_order(lines) for phase, lines in found.items()}
        try:
            if origin := read_origin(directory):
                origins |= dict.fromkeys(found or [origin.command], origin)
        except UserError as error:
            notes.append(str(error))
    for phase, lines in phases.items():
        notes += _odd_values(phase, lines)
    measured = measured_in((workdir, workdir / "after", workdir / "before", *directories), notes)
    return Run(
        workdir.resolve().name if name is None else name,
        workdir,
        phases,
        origins,
        _with_evaluation(summary, read_object(workdir / "evaluation.json", notes)),
        {
            when: _first_of_each(workdir / when / "samples.jsonl", notes)
            for when in ("before", "after", "")
        },
        [
            trace
            for directory in (workdir, *directories)
            for trace in read_records(
                directory / "traces.jsonl",
                lambda trace: _is_sample(trace) and number(trace.get("step")) is not None,
                "completion",
                notes,
            )
        ],
        [
            infill
            for directory in (
                workdir,
                *sorted(path.parent for path in workdir.glob("*/infills.jsonl")),
            )
            for infill in read_records(
                directory / "infills.jsonl", _is_infill, "infilled gap", notes
            )
        ],
        list(dict.fromkeys(notes)),  # a file that is read for two things is noted once
        measured,
    )


def measured_in(directories: Sequence[Path], notes: list[str]) -> dict[str, Summary]:
    """Returns what was measured on problems: each file of the first place that has it."""
    return {
        name: next(filter(None, (read_object(place / file, notes) for place in directories)), {})
        for name, file in FILES.items()
    }


def phase_directories(workdir: Path, summary: Summary) -> list[Path]:
    """Returns the directories of a workdir's phases, in the order in which they run."""
    named = [*PHASES, *(name for name in summary if name not in PHASES)]
    return [
        workdir / name
        for name in named
        if Path(name).name == name and (workdir / name / "metrics.jsonl").is_file()
    ]


def text_phases(phases: PhaseMetrics) -> PhaseMetrics:
    """Returns the phases that learn from text, not from conversations nor from rewards."""
    return {
        phase: lines
        for phase, lines in phases.items()
        if phase != "finetune" and not any("reward" in line for line in lines)
    }


def in_order(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns lines of metrics by step; what a step has twice counts as the later line has it."""
    by_step: dict[tuple[float, bool], dict[str, Any]] = {}
    for line in lines:
        is_validation = not any(name in line for name in ("loss", "lm", "reward"))
        before = by_step.get((line["step"], is_validation), {})
        by_step[line["step"], is_validation] = before | line
    return [by_step[key] for key in sorted(by_step)]


def _is_metrics(record: dict[str, Any]) -> bool:
    step = number(record.get("step"))
    return step is not None and step >= 0 and isinstance(record.get("stage"), str)


def _is_sample(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(name), str) for name in ("prompt", "completion"))


def _is_infill(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(name), str) for name in ("prefix", "middle", "suffix"))


def _first_of_each(path: Path, notes: list[str]) -> list[Sample]:
    """Returns the first completion of each problem in a samples.jsonl, in order."""
    first: dict[str, Sample] = {}
    for sample in read_records(path, _is_sample, "completion", notes):
        first.setdefault(sample["prompt"], sample)
    return list(first.values())


def _odd_values(phase: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a note for each metric that has values which are no finite numbers."""
    counts: dict[str, list[int]] = {}
    for line in lines:
        for name, value in line.items():
            if not isinstance(value, list):
                count = counts.setdefault(name, [0, 0])
                count[0] += 1
                count[1] += number(value) is None
    names = {"step", "stage", "time"}
    return [
        f"{phase}: {odd:,} of {total:,} values of {name} are no finite numbers and are left out"
        for name, (total, odd) in counts.items()
        if odd and name not in names
    ]


def problems_of(found: Mapping[str, Any]) -> str:
    """Returns which problems an evaluation, a comparison or perplexities are of, in words."""
    parts = (found, mapping(found.get("a")), mapping(found.get("of_b")))
    return TRAINING if any(part.get("split") == "train" for part in parts) else HELD_OUT


def _with_evaluation(summary: Summary, evaluation: Mapping[str, Any]) -> Summary:
    """Returns a summary with what launch.evaluate measured in the same workdir.

    What it measured on problems to train on is a part of its own, "training_problems".
    """
    if not evaluation:
        return summary
    pretrain = {
        name: value
        for name, value in evaluation.items()
        if name.startswith("middle_loss") or name == "infilling"
    }
    renamed = {"pass_at_k": "pass_at_k_after", "problems": "problems", "samples": "samples"}
    policy = {ours: evaluation[name] for name, ours in renamed.items() if name in evaluation}
    indexer = {
        name.removeprefix("indexer_"): value
        for name, value in evaluation.items()
        if name.startswith("indexer_recall")
    }
    votes = evaluation.get("cons_at_k")
    last = mapping(votes[-1] if isinstance(votes, list) and votes else None)
    mean = mapping(evaluation.get("mean_at_n"))
    policy |= {"cons@n": last.get("mean"), "mean@n": mean.get("mean")} if last or mean else {}
    which = "training_problems" if problems_of(evaluation) == TRAINING else "reinforce"
    parts = {"pretrain": pretrain, which: policy, "indexer": indexer}
    added = {name: {**mapping(summary.get(name)), **part} for name, part in parts.items() if part}
    return {**summary, **added}
