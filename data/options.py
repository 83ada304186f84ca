"""Options by string, "NAME?option=value&...": one value of a config, which a sweep can list."""

import difflib
import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from errors import UserError

_WORDS = {"true": True, "1": True, "false": False, "0": False}


def split_options(query: str) -> dict[str, str]:
    """Splits the part behind the question mark into option -> value, as text.

    In a value, %26 is an ampersand and %25 a per cent. Raises UserError if an option has no value,
    or comes twice.
    """
    found: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        option, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} has no value; write {option}=VALUE")
        if option in found:
            raise UserError(f"{option} is given twice")
        found[option] = unquote(text)
    return found


def option_value(option: str, text: str, kind: type) -> Any:
    """Returns the value that a text stands for. Raises UserError if it is of another type."""
    try:
        value = _WORDS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{option} = {text[:60]}: is not of type {kind.__name__}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option} = {text[:60]}: must be finite")
    return value


def unknown(name: str, known: Iterable[str], kind: str = "option") -> str:
    """Writes that there is no such name, with the one that was meant, or all that there are."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"no {kind} {name!r}; {hint}"
