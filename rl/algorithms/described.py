"""The table as a person, or a program, reads it: papers, functions, options, needs and costs."""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rl.algorithms.row import COLUMNS, Row
from rl.algorithms.spec import get_algorithm, get_row
from rl.algorithms.table import ROWS
from rl.algorithms.tokens import NEEDS

WIDTH = 79  # columns of a terminal


class Option(NamedTuple):
    """An option of a row: its name, its value there, and whose it is.

    `of` is a column, "every row", or "the loop" for a field of reinforce that the row sets.
    """

    name: str
    value: Any
    of: str


def options_of(name: str) -> list[Option]:
    """Returns the options of a row, with the values it gives them; those of every row come last."""
    row = get_row(name)
    found = list(_of_functions(row))
    found += [Option(field, value, "the loop") for field, value in row.loop.items()]
    common = get_algorithm(name, max_completion=1).options
    values = dataclasses.asdict(common)
    return found + [Option(field, value, "every row") for field, value in values.items()]


def record(name: str) -> dict[str, Any]:
    """Returns what there is to say of a row as JSON.

    Keys: "name", "paper", "formula", "functions" (column -> name of the function), "files", "needs"
    (what the row needs -> what that costs), "options" and "loop" (name -> value).
    """
    row, algorithm = get_row(name), get_algorithm(name, max_completion=1)
    functions = {column: getattr(row, column) for column in COLUMNS}
    given = {column: function for column, function in functions.items() if function}
    options = options_of(name)
    return {
        "name": name,
        "paper": row.paper,
        "formula": row.formula.split("\n"),
        "functions": {column: function.__name__ for column, function in given.items()},
        "files": sorted({_file(function) for function in given.values()}),
        "needs": {need: NEEDS[need] for need in NEEDS if need in algorithm.needs},
        "options": {each.name: each.value for each in options if each.of != "the loop"},
        "loop": dict(row.loop),
    }


def listing() -> str:
    """Returns the table, a row of it in two lines: functions, and the paper."""
    lines = [f"{'row':<22}{'advantage':<20}{'surrogate':<20}{'aggregate':<16}", ""]
    for name in ROWS:
        functions = record(name)["functions"]
        cells = functions["advantage"], functions["surrogate"], functions["aggregate"]
        lines.append(f"{name:<22}{cells[0]:<20}{cells[1]:<20}{cells[2]}")
        lines.append(f"  {textwrap.shorten(ROWS[name].paper, WIDTH - 2)}")
    return "\n".join([*lines, "", "--row=NAME says more of one."])


def description(name: str) -> str:
    """Returns the formula, options, files and costs of a row, or of one of a person's own.

    Raises UserError if there is none.
    """
    row, said = get_row(name), record(name)
    lines = [f"{name}: {row.paper}", "", *(f"    {line}" for line in said["formula"]), ""]
    for column, function in said["functions"].items():
        summary = inspect.getdoc(getattr(row, column)) or ""
        lines.append(f"{column:<10}{function}: {summary.splitlines()[0] if summary else ''}")
    lines += ["", "costs", *_wrapped(f"{need}: {cost}" for need, cost in said["needs"].items())]
    if not said["needs"]:
        lines.append("    nothing beside sampling and the update")
    groups: dict[str, list[str]] = {}
    for option in options_of(name):
        default = _default(option)
        groups.setdefault(option.of, []).append(f"{option.name}={default}")
    for of, words in groups.items():
        title = f"options of {of if of in ('every row', 'the loop') else f'its {of}'}"
        lines += ["", title, *_wrapped(["  ".join(words)])]
    lines += ["", "files", *_wrapped([", ".join(said["files"])])]
    return "\n".join(lines)


def _of_functions(row: Row) -> Iterator[Option]:
    for column in COLUMNS:
        function = getattr(row, column)
        for parameter in inspect.signature(function).parameters.values() if function else ():
            value = row.options.get(parameter.name, parameter.default)
            yield Option(parameter.name, value, column)


def _default(option: Option) -> str:
    if option.name == "divisor" and not option.value:
        return "0 (the longest completion)"
    return repr(option.value) if option.value == "" else str(option.value)


def _file(function: Callable) -> str:
    """Returns the file of a function, as a path from the repository."""
    return function.__module__.replace(".", "/") + ".py"


def _wrapped(lines: Any) -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    ]
