"""Every command's beginning and end: flags, one call of `run`, and errors for people.

What a person did wrong is one line; what we did wrong keeps its traceback.

    def run(config: Config, workdir: Path, *, samples: int) -> None: ...

    if __name__ == "__main__":
        command(run, flags={"samples": Flag(4, "completions to print")})
"""

import errno
import gc
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from errors import UserError
from experiment.config_files import split_overrides
from experiment.flags import Flag, describe_flags, parse_flags
from experiment.inputs import INPUTS, Input
from experiment.processes import pretend_devices
from experiment.workdir import checked_workdir

WORKDIR = {"workdir": Flag("", "where this run keeps everything it writes")}
DEVICES = {"pretend_devices": Flag(0, "dry run: pretend this CPU is so many devices")}


def command(
    run: Callable[..., object],
    *,
    config: Literal["file", "recorded", "model", "source", "none"] = "file",
    workdir: bool = True,
    flags: Mapping[str, Flag] | None = None,
    rest: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line and calls `run`.

    Exits with 2 and one line on stderr for a person's error, with 130 when interrupted, and with 1
    and a traceback for a bug.

    With ATHANOR_DISTRIBUTED in the environment (launch/pod.py sets it) this process first joins the
    others (experiment/processes.py).

    Args:
      run: called as run(config=Config, workdir=Path, **flags), with those of these that the
        arguments below ask for. Its module's docstring is what `--help` prints.
      config: where the config comes from (experiment/inputs.py). "file" wants --config; "recorded"
        falls back to the config of the run in --workdir; "none" has no --config. "model" has a
        --model in its place, a run's workdir or hf:DIR, of whose config fields may be overridden;
        `run` gets it as `model`. "source" wants --config too, but hands `run` the unread
        ConfigSource.
      workdir: whether there is a --workdir. It may not exist yet.
      flags: the command's own.
      rest: the keyword of `run` that takes, as a list, the words after `--`; without it a stray
        word is an error.
      argv: the words after the program's name; sys.argv by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    source, own = INPUTS[config], dict(flags or {})
    known = source.flags() | (WORKDIR if workdir else {})
    known |= (DEVICES if source.has_config else {}) | own
    before_dashes = argv[: argv.index("--")] if "--" in argv else argv
    if {"--help", "-h", "-help"} & set(before_dashes):
        print(_help(run, known))
        sys.exit(0)
    # What the imports made is here to stay; collecting garbage through it takes half a second of
    # tracing a model.
    gc.freeze()
    try:
        run(**_arguments(argv, source, known, own, rest))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        full = _disk_full(error)
        if full is None:
            raise
        _fail(f"{full}; free some space and give the same command again")


def _arguments(
    argv: list[str], source: Input, known: Mapping[str, Flag], own: Mapping[str, Flag], rest: str
) -> dict[str, Any]:
    """Returns the keyword arguments of `run`.

    Whatever can be wrong with a command line raises UserError here.
    """
    overrides, words = split_overrides(argv)
    if overrides and not source.has_config:
        raise UserError(f"{overrides[0]}: this command takes no --config")
    values, strays = parse_flags(words, known)
    if strays and not rest:
        raise UserError(f"{strays[0]}: not expected here (a flag is --NAME=VALUE; see --help)")
    source.check(values)
    arguments = {name: values[name] for name in own}
    if rest:
        arguments[rest] = strays
    if "workdir" in known:
        reads = source.reads_workdir(values)
        arguments["workdir"] = checked_workdir(values["workdir"], reads=reads)
    pretend_devices(values.get("pretend_devices", 0))
    return arguments | source.resolve(values, overrides, arguments.get("workdir"))


def _help(run: Callable[..., object], flags: Mapping[str, Flag]) -> str:
    lines = [inspect.getdoc(sys.modules[run.__module__]) or ""]
    return "\n".join(lines + (["", "flags:", *describe_flags(flags)] if flags else []))


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _disk_full(error: BaseException | None) -> str | None:
    """Returns the words for a full disk if one is anywhere in the chain of causes.

    Tensorstore, beneath Orbax, reports it as a ValueError.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.filename or 'writing'}: {error.strerror}"
        if os.strerror(errno.ENOSPC) in str(error):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None
