"""Writes the report of a run, of several side by side, or of a sweep."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from experiment.run_record import origin_of
from files import write_text
from report.comparison import Comparison, compared, run_names, swept
from report.escape import plain
from report.lenient import mapping, read_object
from report.page import run_page, runs_page
from report.results import Run, read_run

NAME = "report.html"
COMPARISON = "comparison.html"  # beside the workdirs: that place may be a run's, with its report
SWEEP = "results.json"  # in the workdir of a sweep: its question, its runs and their results


def write_report(workdir: Path, *others: Path, out: Path | None = None) -> Path:
    """Writes one page and returns its path; prints what in the files was left out.

    Of one workdir it is the page of that run, in the workdir; of the workdir of a sweep, or of a
    directory of workdirs, it compares those. Of several workdirs it compares them, in a file
    comparison.html in the directory that holds the first.

    Args:
      out: the file to write in place of these.

    Raises:
      UserError: there is nothing to report, or the page cannot be written.
    """
    for directory in (workdir, *others):
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; --workdir names that of a run")
    runs = _read_runs((workdir, *others))
    place = workdir / NAME if len(runs) == 1 else workdir.resolve().parent / COMPARISON
    comparison = compared(f"{len(runs)} runs", runs) if len(runs) > 1 else None
    if comparison is None and runs[0].empty and (below := workdirs_below(workdir)):
        notes = runs[0].notes
        runs = _read_runs(below)
        comparison = _compared_below(workdir, runs)._replace(notes=notes)
    for run in runs:
        for note in run.notes:
            print(f"warning: {plain(note)}", file=sys.stderr)
    if all(run.empty for run in runs):
        raise UserError(
            f"{workdir}: nothing to report there (no summary.json, metrics.jsonl or samples.jsonl "
            "that can be read)"
        )
    page = run_page(runs[0]) if comparison is None else runs_page(comparison)
    path = out or place
    try:
        write_text(path, page)
    except UserError as error:
        raise UserError(f"{error}; launch.report --out=FILE writes it elsewhere") from error
    return path


def workdirs_below(directory: Path) -> list[Path]:
    """Returns the workdirs of runs in `directory`: those of its sweep in order, or all by name."""
    listed = read_object(directory / SWEEP, []).get("runs")
    if isinstance(listed, list):
        swept_names = [str(mapping(record).get("name")) for record in listed]
        return [directory / name for name in swept_names if Path(name).name == name]
    names = ("metrics.jsonl", "summary.json", "config.json")
    try:
        return sorted(
            path for path in directory.iterdir() if any((path / name).is_file() for name in names)
        )
    except OSError as failure:
        raise UserError(f"{directory}: cannot be read: {failure.strerror}") from failure


def _read_runs(workdirs: Sequence[Path]) -> list[Run]:
    unique = list({os.path.realpath(workdir): workdir for workdir in workdirs}.values())
    named = zip(unique, run_names(unique), strict=True)
    return [read_run(workdir, origin_of, name) for workdir, name in named]


def _compared_below(directory: Path, runs: Sequence[Run]) -> Comparison:
    """Compares the runs in a directory as its sweep does, if it is that of one."""
    title = directory.resolve().name
    notes: list[str] = []
    sweep = read_object(directory / SWEEP, notes)
    return swept(title, sweep, runs) if sweep else compared(title, runs)
