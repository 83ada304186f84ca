"""Several runs side by side: what they differ in, and what came of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report.lenient import mapping, number
from report.results import PhaseMetrics, Run, text_phases
from report.stages import stages_of
from report.story import duration

COLUMNS = 12  # of results, in the table of a sweep


class Comparison(NamedTuple):
    """Several runs, with the table that compares them; a row of texts for each run."""

    title: str
    question: str  # that a sweep asks, "" for others
    runs: Sequence[Run]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()  # beside those of the runs
    labels: Sequence[str] = ()  # of the rows, in place of the runs' names


def compared(title: str, runs: Sequence[Run]) -> Comparison:
    """Compares runs by the fields of their configs that differ, and by what they reached."""
    every = [_changes(run) for run in runs]
    names = list(dict.fromkeys(name for changes in every for name in changes))
    differing = [name for name in names if len({repr(changes.get(name)) for changes in every}) > 1]
    columns = {
        name: [str(changes.get(name, "")) for changes in every] for name in differing[:COLUMNS]
    }
    columns |= {
        "steps": [f"{sum(stage.steps for stage in stages_of(run)):,}" for run in runs],
        "time": [_time(run) for run in runs],
        "loss": [_last(text_phases(run.phases), "lm") for run in runs],
        "validation loss": [_last(text_phases(run.phases), "validation_lm") for run in runs],
        "reward": [_last(run.phases, "reward") for run in runs],
        "pass@1": [_pass_at_1(run) for run in runs],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return Comparison(title, "", runs, list(shown), list(zip(*shown.values(), strict=True)))


def swept(title: str, sweep: Mapping[str, Any], runs: Sequence[Run]) -> Comparison:
    """Compares the runs of a sweep by what it changes and by the results that it shows.

    Args:
      sweep: results.json of a sweep's workdir.
    """
    listed = sweep.get("runs")
    records = {
        str(mapping(record).get("name")): mapping(record)
        for record in (listed if isinstance(listed, list) else [])
    }
    found = [records.get(run.workdir.name, {}) for run in runs]
    changes = [mapping(record.get("changes")) for record in found]
    changed = list(dict.fromkeys(name for one in changes for name in one))
    shown = sweep.get("columns")
    results = [name for name in shown if isinstance(name, str)] if isinstance(shown, list) else []
    rows = [
        [
            *(str(one.get(name, "")) for name in changed),
            *(_figure(mapping(record.get("results")).get(name)) for name in results),
            duration(seconds) if (seconds := number(record.get("seconds"))) is not None else "",
            {0: "finished", None: "not finished"}.get(code := record.get("exit"), f"exit {code}"),
        ]
        for record, one in zip(found, changes, strict=True)
    ]
    question = sweep.get("question")
    named = [
        dataclasses.replace(run, name=", ".join([str(place), *_short(one)]))
        for place, (run, one) in enumerate(zip(runs, changes, strict=True), 1)
    ]
    return Comparison(
        title,
        question if isinstance(question, str) else "",
        named,
        [*changed, *results, "time", "ended"],
        rows,
        labels=[str(place) for place in range(1, len(runs) + 1)],
    )


def _short(changes: Mapping[str, Any]) -> list[str]:
    """Returns what a run changes, each field by the last part of its name."""
    return [f"{field.rpartition('.')[2]} {value}" for field, value in changes.items()]


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that tell them apart."""
    parts = [path.resolve().parts for path in workdirs]
    depth = next(
        (
            depth
            for depth in range(1, max(map(len, parts)) + 1)
            if len({one[-depth:] for one in parts}) == len(parts)
        ),
        1,
    )
    return ["/".join(one[-depth:]) for one in parts]


def _changes(run: Run) -> dict[str, Any]:
    """Returns the changed fields of a run; those of several phases begin with the phase's name."""
    several = len(run.origins) > 1
    changes: dict[str, Any] = {}
    for phase, origin in run.origins.items():
        changes |= {"seed": origin.seed} if origin.seed is not None else {}
        found = {**origin.changes} | ({} if several else {"init_from": origin.init_from})
        changes |= {f"{phase}: {name}" if several else name: v for name, v in found.items()}
    return changes


def _time(run: Run) -> str:
    known = [stage.seconds for stage in stages_of(run) if stage.seconds is not None]
    return duration(sum(known)) if known else ""


def _last(phases: PhaseMetrics, metric: str) -> str:
    values = [
        value
        for lines in phases.values()
        for line in lines
        if (value := number(line.get(metric))) is not None
    ]
    return _figure(values[-1]) if values else ""


def _pass_at_1(run: Run) -> str:
    solved = number(mapping(run.summary.get("reinforce")).get("pass@1_after"))
    if solved is not None:
        return f"{solved:.1%}"
    last = _last(run.phases, "validation_pass_at_1")
    return f"{float(last):.1%}" if last else ""


def _figure(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:.5g}"
