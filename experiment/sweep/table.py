"""Shows the results of a sweep: a table on the terminal, and with every column in results.csv.

results.json has the same for report.html, the page of the sweep.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from errors import UserError
from experiment.sweep.runs import SweepRun
from experiment.sweep.seeds import Seeds, over_seeds
from files import write_json, write_text

COLUMNS_SHOWN = 8  # unless they are named; results.csv has them all


def write_table(
    question: str, runs: Sequence[SweepRun], workdir: Path, columns: Sequence[str]
) -> None:
    """Prints the table and writes results.csv, results.json and report.html into the workdir.

    Args:
      question: of the sweep, the table's title.
      runs: all of them, ended or not.
      workdir: of the sweep.
      columns: results to print; without any, those that all finished runs have.

    Raises:
      UserError: runs failed, or no run has one of the columns.
    """
    results = {run.name: run.results() for run in runs}
    found = _unique(name for values in results.values() for name in values)
    finished = [run for run in runs if run.exit_code() == 0]
    common = [name for name in found if all(name in results[run.name] for run in finished)]
    shown = list(columns) or common[:COLUMNS_SHOWN]
    seeds = over_seeds(runs, results)
    _write_csv(workdir / "results.csv", runs, results, found)
    _write_json(workdir / "results.json", question, runs, results, shown, seeds)
    # The question is not rich's title, which wraps at the width of the table.
    print(f"\n{question or 'sweep'}", flush=True)
    _print_table(runs, results, shown)
    _print_means(seeds, shown)
    hidden = 0 if columns else len(common) - len(shown)
    more = f" ({hidden} more columns there; choose with --show=NAME)" if hidden else ""
    print(f"{workdir / 'results.csv'}{more}", flush=True)
    _write_report(workdir)

    if len(finished) < len(runs):
        failed = [run for run in runs if run.exit_code() != 0]
        named = [f"{run.name} (exit {run.exit_code()}, log {run.log})" for run in failed]
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed or were stopped: {', '.join(named)}"
        )
    if missing := [name for name in columns if name not in found]:
        there = ", ".join(found) or "no summary.json"
        raise UserError(f"--show={missing[0]}: no run has it (has: {there})")


Results = dict[str, dict[str, float]]  # name of a run -> its numbers


def _write_csv(
    path: Path, runs: Sequence[SweepRun], results: Results, columns: Sequence[str]
) -> None:
    """Writes a line for each run: how it ended, its changed fields and its results."""
    changed = _unique(field for run in runs for field in run.changes)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "exit", "seconds", *changed, *columns])
    for run in runs:
        record = run.exit_record() or {}
        values = [run.changes.get(field) for field in changed]
        numbers = [results[run.name].get(name) for name in columns]
        writer.writerow([run.name, record.get("exit"), record.get("seconds"), *values, *numbers])
    write_text(path, text.getvalue())


def _write_json(
    path: Path,
    question: str,
    runs: Sequence[SweepRun],
    results: Results,
    columns: Sequence[str],
    seeds: Sequence[Seeds],
) -> None:
    """Writes what the report shows: the question, the columns, and a record for each run.

    With them goes what runs of several seeds come to.
    """
    records = [
        {
            "name": run.name,
            "changes": run.changes,
            **{name: (run.exit_record() or {}).get(name) for name in ("exit", "seconds")},
            "results": results[run.name],
        }
        for run in runs
    ]
    means = [
        {
            "changes": group.changes,
            "seeds": group.count,
            "results": {name: found._asdict() for name, found in group.results.items()},
        }
        for group in seeds
    ]
    write_json(
        path,
        {"question": question, "columns": list(columns), "runs": records, "over_seeds": means},
    )


def _write_report(workdir: Path) -> None:
    """Writes the page of a sweep; of one whose runs left nothing there is none."""
    from experiment.reporting import write_report  # brings jax, which runs alone need before

    try:
        print(f"wrote {write_report(workdir)}", flush=True)
    except UserError as error:
        print(f"no report: {error}", flush=True)


def _print_table(runs: Sequence[SweepRun], results: Results, columns: Sequence[str]) -> None:
    """Prints a row for each run: its changed fields, its results and its exit code."""
    changed = _unique(field for run in runs for field in run.changes)
    table = Table(*changed, *columns, "exit", box=box.SIMPLE_HEAD)
    for run in runs:
        numbers = results[run.name]
        values = [f"{numbers[name]:.5g}" if name in numbers else "-" for name in columns]
        changes = [str(run.changes.get(field, "")) for field in changed]
        table.add_row(*changes, *values, str(run.exit_code()))
    _console().print(table)


def _print_means(seeds: Sequence[Seeds], columns: Sequence[str]) -> None:
    """Prints a row for runs that differ in their seed alone: means, with 95 % intervals."""
    if not seeds:
        return
    changed = _unique(field for group in seeds for field in group.changes)
    table = Table(*changed, *columns, "seeds", box=box.SIMPLE_HEAD)
    for group in seeds:
        found = [group.results.get(name) for name in columns]
        values = [f"{x.mean:.4g} ({x.low:.4g} to {x.high:.4g})" if x else "-" for x in found]
        changes = [str(group.changes.get(field, "")) for field in changed]
        table.add_row(*changes, *values, str(group.count))
    print("means over seeds, with 95 % intervals by Student's t", flush=True)
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=4_000)  # a file has no edge to wrap at


def _unique(names: Iterable[str]) -> list[str]:
    """Returns the names in order, each once."""
    return list(dict.fromkeys(names))
