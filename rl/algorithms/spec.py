"""Names an algorithm by a string: "ROW", "ROW?option=value&...", or "FILE.py:NAME?...".

An option is one of a function of the row, one of `Options`, or a column: `advantage`, `ratio`,
`surrogate`, `aggregate` and `selection` name another function for the row. So an algorithm, its
options too, is one value of a config, which a sweep can list.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from data.options import option_value, split_options, unknown
from data.python_files import errors_in, is_attribute, load_attribute
from errors import UserError
from rl.algorithms.aggregations import AGGREGATIONS
from rl.algorithms.credit import CREDITS
from rl.algorithms.options import Options
from rl.algorithms.outcomes import OUTCOMES
from rl.algorithms.ratios import RATIOS
from rl.algorithms.returns import RETURNS
from rl.algorithms.row import COLUMNS, Algorithm, Row
from rl.algorithms.selections import SELECTIONS
from rl.algorithms.surrogates import SURROGATES
from rl.algorithms.table import ROWS

FUNCTIONS: dict[str, Mapping[str, Callable]] = {
    "advantage": OUTCOMES | RETURNS | CREDITS,
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "aggregate": AGGREGATIONS,
    "selection": SELECTIONS,
}
"""The functions that a column may have, by the names that options give them."""


def get_algorithm(spec: str, *, max_completion: int, kl_weight: float = -1.0) -> Algorithm:
    """Returns the algorithm that a string names.

    Args:
      spec: see above. In a value, %26 is an ampersand and %25 a per cent.
      max_completion: tokens that the longest completion samples (sampling.most_sampled).
      kl_weight: coefficient of the divergence; -1 keeps the algorithm's own.

    Raises:
      UserError: there is no such row or option, a value is refused, or a person's file fails.
    """
    name, _, query = spec.partition("?")
    row = get_row(name)
    try:
        algorithm = built(name, row, split_options(query), max_completion, kl_weight)
    except UserError as error:
        raise UserError(f"reinforce.algorithm = {spec!r}: {error}") from error
    return algorithm


def get_row(name: str) -> Row:
    """Returns a row of the table, or of a person's file.

    Raises UserError if there is none, or the file fails.
    """
    if name in ROWS:
        return ROWS[name]
    if not is_attribute(name):
        near = difflib.get_close_matches(name.lower(), ROWS, n=1)
        question = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"reinforce.algorithm = {name!r}: {question}(rows of rl/algorithms/table.py: "
            f"{', '.join(ROWS)}; or FILE.py:NAME, a row of your own)"
        )
    row: Any = load_attribute(name)
    if not isinstance(row, Row):
        raise UserError(
            f"reinforce.algorithm = {name!r}: is a {type(row).__name__}, not a "
            "rl.algorithms.row.Row"
        )
    return row


def built(
    name: str, row: Row, given: Mapping[str, str], max_completion: int, kl_weight: float
) -> Algorithm:
    """Returns a row with its options.

    Args:
      given: option -> its value, as text.
    """
    columns = {column: getattr(row, column) for column in COLUMNS}
    for column in COLUMNS:
        if column in given:
            columns[column] = _function(column, given[column])
    known = known_options(columns) | {key: type(value) for key, value in row.loop.items()}
    values, loop = dict(row.options), dict(row.loop)
    for option, text in given.items():
        if option in COLUMNS:
            continue
        if option not in known:
            raise UserError(unknown(option, known))
        target = loop if option in row.loop else values
        target[option] = option_value(option, text, known[option])
    if kl_weight != -1:
        values["kl"] = kl_weight
    if not values.get("divisor"):
        values["divisor"] = float(max_completion)
    built_columns = {}
    for column, function in columns.items():
        names = inspect.signature(function).parameters if function else ()
        options = {option: values[option] for option in names if option in values}
        own = errors_in(name.rpartition(":")[0], f" ({column})") if ":" in name else nullcontext()
        with own:
            built_columns[column] = function(**options) if function else None
    fields = [field.name for field in dataclasses.fields(Options)]
    extra = Options(**{option: values[option] for option in fields if option in values})
    functions = built_columns["surrogate"], built_columns["ratio"]
    if extra.delta and any(getattr(each, "ignores_sampler", False) for each in functions):
        raise UserError(f"delta = {extra.delta}: {name} has no ratio that it could bound")
    corrected = extra.correction or extra.rejection
    if corrected and loop.setdefault("old_logprobs", "trainer") == "sampler":
        raise UserError(
            "correction and rejection compare the trainer's old log-probs with the sampler's, "
            "which this row takes for the same; add old_logprobs=trainer"
        )
    return Algorithm(name, **built_columns, options=extra, loop=loop)


def known_options(columns: Mapping[str, Callable | None]) -> dict[str, type]:
    """Returns the options of some functions, and those of every row, with their types."""
    found: dict[str, type] = {}
    for function in filter(None, columns.values()):
        for parameter in inspect.signature(function).parameters.values():
            found[parameter.name] = type(parameter.default)
    return found | {field.name: type(field.default) for field in dataclasses.fields(Options)}


def _function(column: str, name: str) -> Callable | None:
    """Returns the function of a column that a name stands for; "none" is no selection."""
    if column == "selection" and name == "none":
        return None
    if name not in FUNCTIONS[column]:
        raise UserError(f"{column} = {name!r}: {unknown(name, FUNCTIONS[column], 'function')}")
    return FUNCTIONS[column][name]
