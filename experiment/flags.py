"""The flags of a command: declared by a default, parsed by absl, and written out for --help."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags

from errors import UserError
from experiment.fields import WIDTH, fields
from experiment.nearest import nearest


class Flag(NamedTuple):
    """A flag of one command, of the type of its default.

    That is bool, int, float, str, or a tuple of str for a flag that may be repeated.
    """

    default: bool | int | float | str | tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()  # of a str


# Of the commands that chat.
TEMPLATE_OPTIONS = Flag(
    "", """switches of the chat template, such as '{"enable_thinking": false}'"""
)


def parse_flags(
    words: Sequence[str], flags: Mapping[str, Flag]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the value of each flag, and the words that are no flags.

    Raises UserError for an unknown flag or a value of another type.
    """
    parsed = absl_flags.FlagValues()
    for name, flag in flags.items():
        _define(parsed, name, flag)
    try:
        strays = parsed(["command", *words])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise UserError(_no_such_flag(error.flagname, flags)) from error
    except absl_flags.Error as error:
        raise UserError(str(error)) from error
    values: dict[str, Any] = {name: parsed[name].value for name in flags}
    for name, flag in flags.items():
        if isinstance(flag.default, tuple):
            values[name] = tuple(values[name])
    return values, strays


def _no_such_flag(name: str, flags: Mapping[str, Flag]) -> str:
    """Says that a flag does not exist, and which flag or field of the config is meant."""
    known = [*flags, *(f"config.{field.name}" for field in fields() if "config" in flags)]
    meant = nearest(name, known)
    return f"--{name}: no such flag ({f'did you mean --{meant}?' if meant else 'see --help'})"


def _define(parsed: absl_flags.FlagValues, name: str, flag: Flag) -> None:
    """Defines an absl flag of the type of its default."""
    if flag.choices and isinstance(flag.default, str):
        absl_flags.DEFINE_enum(
            name, flag.default, list(flag.choices), flag.help, flag_values=parsed
        )
        return
    define = {
        bool: absl_flags.DEFINE_bool,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        str: absl_flags.DEFINE_string,
        tuple: absl_flags.DEFINE_multi_string,
    }[type(flag.default)]
    define(name, flag.default, flag.help, flag_values=parsed)


def describe_flags(flags: Mapping[str, Flag]) -> list[str]:
    """Describes each flag: its name, the kind of its value, its meaning and default."""
    lines = []
    for name, flag in flags.items():
        kind = "|".join(flag.choices) or {bool: "", int: "N", float: "X"}.get(
            type(flag.default), "TEXT"
        )
        shown = f"--{name}={kind}" if kind else f"--{name}"
        repeated = " (may be repeated)" if isinstance(flag.default, tuple) else ""
        default = f" (default {flag.default})" if flag.default else ""
        line = f"  {shown:<22}  {flag.help}{repeated}{default}"
        lines += textwrap.wrap(
            line, WIDTH, subsequent_indent=" " * 26, break_on_hyphens=False, break_long_words=False
        )
    return lines
