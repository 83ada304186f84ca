"""The fields of a config, with the defaults and meanings that its dataclasses give them."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from errors import UserError
from experiment.schema import Config

WIDTH = 79  # columns: a terminal has 80 unless somebody makes it wider


class Field(NamedTuple):
    """One field: its dotted name, its default, and the comment beside or above it."""

    name: str
    default: Any
    meaning: str


def fields(section: Any = None, prefix: str = "") -> Iterator[Field]:
    """Yields the fields of a section and of the sections inside it; of the whole config if None."""
    section = Config() if section is None else section
    meanings: dict[str, str] = {}
    for cls in reversed(type(section).__mro__):
        meanings |= _comments(cls) if dataclasses.is_dataclass(cls) else {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield Field(prefix + field.name, value, meanings[field.name])


def describe(under: str = "") -> str:
    """Returns the fields whose name begins with `under`, one below the other.

    Raises UserError if there are none.
    """
    found = [
        field for field in fields() if f"{field.name}.".startswith(f"{under}." if under else "")
    ]
    if not found:
        raise UserError(f"{under}: no such field or section of a config")
    blocks = []
    for name, default, meaning in found:
        lines = textwrap.wrap(meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
        blocks.append("\n".join([f"{name} = {default!r}", *lines]))
    return "\n".join(blocks)


def _comments(section: type) -> dict[str, str]:
    """Returns for each field of a dataclass the comment above it and the one on its line."""
    lines = textwrap.dedent(inspect.getsource(section)).split("\n")
    (tree,) = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            above = [line.strip().lstrip("# ") for line in lines[first : node.lineno - 1]]
            _, _, beside = lines[node.lineno - 1].partition("  # ")
            found[node.target.id] = " ".join([*above, beside]).strip()
    return found
