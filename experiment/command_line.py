"""Every command's beginning and end: flags, one call of `run`, and errors for people.

What a person did wrong is one line; what we did wrong keeps its traceback.

    def run(config: Config, workdir: Path, *, samples: int) -> None: ...

    if __name__ == "__main__":
        command(run, flags={"samples": Flag(4, "completions to print")})
"""

import gc
import inspect
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from errors import UserError
from experiment.config_files import split_overrides
from experiment.failures import is_lost_process, line_of
from experiment.flags import Flag, describe_flags, parse_flags
from experiment.inputs import INPUTS, Input
from experiment.processes import (
    end_with_the_others,
    is_alone,
    is_first_process,
    leave,
    pretend_devices,
)
from experiment.stop import Stopped, StopSignals, exit_code, output_may_close
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

    Exits with 2 and one line on stderr for a person's error, with 130 or 143 when it is asked to
    stop by Ctrl-C or SIGTERM, and with 1 and a traceback for a bug. Whoever reads the standard
    output may close it.

    With ATHANOR_DISTRIBUTED in the environment (launch/pod.py sets it) this process first joins the
    others (experiment/processes.py).

    Args:
      run: called as run(config=Config, workdir=Path, **flags), with those of these that the
        arguments below ask for. It returns False where it was asked to stop, and did before its
        end. Its module's docstring is what `--help` prints.
      config: where the config comes from (experiment/inputs.py). "file" wants --config; "recorded"
        falls back to the config of the run in --workdir; "none" has no --config. "model" has a
        --model in its place, a run's workdir or hf:DIR, of whose config fields may be overridden;
        `run` gets it as `model`. "source" wants --config too, but hands `run` the unread
        ConfigSource.
      workdir: whether there is a --workdir. It may not exist yet. One among `flags` is as it is
        typed.
      flags: the command's own.
      rest: the keyword of `run` that takes, as a list, the words after `--`; without it a stray
        word is an error.
      argv: the words after the program's name; sys.argv by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments: dict[str, Any] = {}

    def say_stopped(number: int) -> None:
        trains = arguments.get("workdir") if config == "file" else None
        print(_stopped_line(number, trains), file=sys.stderr, flush=True)

    with StopSignals(say_stopped) as signals, output_may_close():
        try:
            source, own = INPUTS[config], dict(flags or {})
            known = source.flags() | (WORKDIR if workdir else {})
            known |= (DEVICES if source.has_config else {}) | own
            before_dashes = argv[: argv.index("--")] if "--" in argv else argv
            if {"--help", "-h", "-help"} & set(before_dashes):
                print(_help(run, known))
                return
            # What the imports made is here to stay; collecting garbage through it takes half a
            # second of tracing a model.
            gc.freeze()
            arguments |= _arguments(argv, source, known, own, rest)
            finished = run(**arguments)
        except KeyboardInterrupt as stopped:
            number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
            say_stopped(number)
            leave(exit_code(number))
        except Exception as error:
            _end(error)
        if finished is False:
            number = signals.first or signal.SIGTERM  # where another process of the run got it
            if is_first_process():
                say_stopped(number)
            sys.exit(exit_code(number))


def _stopped_line(number: int, workdir: Path | None) -> str:
    """Returns what a command that was stopped says; with the workdir of a run, from which step."""
    rest = "give the same command again"
    if workdir is not None:
        places = workdir.glob("checkpoints/*")
        steps = [int(place.name) for place in places if place.name.isdecimal()]
        rest = "nothing is saved yet; the same command begins anew"
        if steps:
            rest = f"the same command goes on from step {max(steps)}"
    return f"{Stopped(number)}; {rest}"


def _end(error: Exception) -> NoReturn:
    """Exits with the line of an error; raises it again where it is a bug."""
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, UserError):
        _fail(str(error))
    if line := line_of(error):
        _fail(line)
    if is_alone():
        raise error
    time.sleep(1)  # who watches over the others names the one that is gone
    if is_lost_process(error):
        end_with_the_others("the connection to another process of this run is lost")
    traceback.print_exception(error)
    leave(1)


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
    if "workdir" in known and "workdir" not in own:
        reads = source.reads_workdir(values)
        # A command without a config reports on what is there, and says itself what it cannot write.
        writes = source.has_config and not reads
        arguments["workdir"] = checked_workdir(values["workdir"], reads=reads, writes=writes)
    pretend_devices(values.get("pretend_devices", 0))
    return arguments | source.resolve(values, overrides, arguments.get("workdir"))


def _help(run: Callable[..., object], flags: Mapping[str, Flag]) -> str:
    lines = [inspect.getdoc(sys.modules[run.__module__]) or ""]
    return "\n".join(lines + (["", "flags:", *describe_flags(flags)] if flags else []))


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    leave(2)
