"""What every command shares: flags in, one call of `run`, and errors that are one line for what a
person did wrong and a traceback for what we did.

def run(config: Config, workdir: Path, *, samples: int) -> None: ...

if __name__ == "__main__":
    command(run, flags={"samples": Flag(4, "completions to print")})
"""

import atexit
import errno
import gc
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict

from checkpoints.locations import hf_directory
from errors import UserError
from experiment.config_files import (
    Source,
    base_config_from,
    experiments,
    split_overrides,
    with_checkpoint_fields,
    with_overrides,
)
from experiment.schema import parse
from experiment.workdir import recorded_config

CONFIG_HELP = {
    "file": "the experiment, configs/x.py or configs/x.py:ARGUMENT; --config.a.b=VALUE overrides a field",
    "recorded": "a config file in place of the one recorded in --workdir (or, of hf:DIR, that of its config.json); --config.a.b=VALUE overrides a field",
}


class Flag(NamedTuple):
    """A flag of one command. Its type is that of the default: bool, int, float, str, or a tuple for
    a flag that may be repeated.
    """

    default: bool | int | float | str | tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()  # of a str


def command(
    run: Callable[..., object],
    *,
    config: Literal["file", "recorded", "model", "source", "none"] = "file",
    workdir: bool = True,
    flags: Mapping[str, Flag] | None = None,
    rest: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, calls `run`, and exits: 0 done, 2 the person's error (one line on
    stderr), 130 interrupted, 1 with a traceback for a bug.

    Args:
      run: called as run(config=Config, workdir=Path, **flags), with what the arguments below leave
        of these. Its module's docstring is what `--help` prints.
      config: "file" wants --config; "recorded" falls back to the one the run in --workdir was
        claimed with; "none" has no --config.
        "model" has a --model in its place, a run's workdir or hf:DIR, of whose config fields may be
        overridden; `run` gets it as `model`. "source" wants it too, but hands `run` the unread
        Source, to pass on to other commands.
      workdir: whether there is a --workdir. It may not exist yet.
      flags: the command's own.
      rest: the keyword of `run` that takes, as a list, what stands after `--`; without it a stray
        word is an error.
      argv: the words after the program's name; sys.argv by default.

    With ATHANOR_DISTRIBUTED in the environment (launch/pod.py sets it) this process first joins the
    others: "1" lets JAX find them (TPU, GKE, Slurm), "ADDRESS:PORT,PROCESS,PROCESSES" says where
    they are.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own = dict(flags or {})
    if set(argv[: argv.index("--")] if "--" in argv else argv) & {"--help", "-h", "-help"}:
        print(_help(run, config, workdir, own))
        sys.exit(0)
    # what the imports made is here to stay; collecting through it takes half a second of tracing a
    # model
    gc.freeze()
    try:
        run(**_arguments(argv, config, workdir, own, rest))
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


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _disk_full(error: BaseException | None) -> str | None:
    """The words of a full disk anywhere in the chain of causes, if that is what it was.
    Tensorstore, beneath orbax, reports it as a ValueError.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.filename or 'writing'}: {error.strerror}"
        if os.strerror(errno.ENOSPC) in str(error):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def _arguments(
    argv: list[str], config: str, workdir: bool, own: dict[str, Flag], rest: str
) -> dict[str, Any]:
    """The keyword arguments of `run`. Whatever can be wrong with a command line raises UserError
    here.
    """
    overrides, words = split_overrides(argv)
    if overrides and config == "none":
        raise UserError(f"{overrides[0]}: this command takes no --config")
    values = absl_flags.FlagValues()
    for name, flag in (_shared(config, workdir) | own).items():
        _define(values, name, flag)
    try:
        strays = values(["command", *words])[1:]
    except absl_flags.Error as error:
        raise UserError(str(error)) from error
    if strays and not rest:
        raise UserError(f"{strays[0]}: not expected here (a flag is --NAME=VALUE; see --help)")
    if config in ("file", "source") and not values["config"].value:
        raise UserError(
            f"--config is missing: name an experiment, such as {' or '.join(experiments()) or 'configs/x.py'}"
        )
    given = {
        name: tuple(values[name].value) if isinstance(flag.default, tuple) else values[name].value
        for name, flag in own.items()
    }
    if rest:
        given[rest] = strays
    if workdir:
        given["workdir"] = _workdir(
            values["workdir"].value, reads=config == "recorded" and not values["config"].value
        )
    if config != "none":
        _pretend(values["pretend_devices"].value)
        path = values["config"].value if config != "model" else values["model"].value
        source = Source(path, tuple(overrides))
        if config == "source":
            return given | {"config": source}
        if config == "model":
            origin = given["model"] = _model(values["model"].value)
            written = _of_model(origin, Path(origin), overrides)
        elif config == "recorded" and not path:
            written = _of_model(values["workdir"].value, given["workdir"], overrides)
        else:
            written = source.read()
        _join()
        try:
            given["config"] = parse(written)
        except UserError as error:
            raise UserError(f"{path or given['workdir']}: {error}") from error
    return given


def _shared(config: str, workdir: bool) -> dict[str, Flag]:
    shared = {}
    if config == "model":
        shared["model"] = Flag(
            "",
            "the workdir of a run, or hf:DIR, a Hugging Face checkpoint; --config.a.b=VALUE overrides a field of its config",
        )
    elif config != "none":
        shared["config"] = Flag("", CONFIG_HELP["recorded" if config == "recorded" else "file"])
    if workdir:
        shared["workdir"] = Flag("", "where this run keeps everything it writes")
    if config != "none":
        shared["pretend_devices"] = Flag(0, "dry run: pretend this CPU is so many devices")
    return shared


def _define(values: absl_flags.FlagValues, name: str, flag: Flag) -> None:
    if isinstance(flag.default, tuple):
        absl_flags.DEFINE_multi_string(name, flag.default, flag.help, flag_values=values)
    elif flag.choices:
        absl_flags.DEFINE_enum(name, flag.default, flag.choices, flag.help, flag_values=values)
    else:
        kinds = {
            bool: absl_flags.DEFINE_bool,
            int: absl_flags.DEFINE_integer,
            float: absl_flags.DEFINE_float,
            str: absl_flags.DEFINE_string,
        }
        kinds[type(flag.default)](name, flag.default, flag.help, flag_values=values)


def _help(run: Callable[..., object], config: str, workdir: bool, own: dict[str, Flag]) -> str:
    known = _shared(config, workdir) | own
    lines = [inspect.getdoc(sys.modules[run.__module__]) or ""] + (["", "flags:"] if known else [])
    for name, flag in known.items():
        kind = (
            "|".join(flag.choices)
            or {bool: "", int: "N", float: "X", str: "TEXT", tuple: "TEXT"}[type(flag.default)]
        )
        shown = f"--{name}={kind}" if kind else f"--{name}"
        default = f" (default {flag.default})" if flag.default else ""
        lines.append(
            f"  {shown:<22}  {flag.help}{' (may be repeated)' if isinstance(flag.default, tuple) else ''}{default}"
        )
    return "\n".join(lines)


def _of_model(origin: str, workdir: Path, overrides: Sequence[str]) -> ConfigDict:
    """The config of a model: that recorded in its workdir, or what its config.json says."""
    return with_checkpoint_fields(
        with_overrides(
            base_config_from(origin) if hf_directory(origin) else recorded_config(workdir),
            overrides,
        ),
        overrides,
    )


def _model(value: str) -> str:
    if not value:
        raise UserError(
            "--model is missing: give the workdir of a run, or hf:DIR for a Hugging Face checkpoint"
        )
    return value


def _workdir(value: str, reads: bool) -> Path:
    """`reads`: the command reads a model there, so it may be that of a checkpoint as it is, which
    is not written to: results then go no further.
    """
    if not value:
        raise UserError(
            "--workdir is missing: say where this run keeps what it writes, such as --workdir=runs/first"
        )
    if hf_directory(value):
        if not reads:
            raise UserError(
                f"--workdir={value}: this command writes there; to start from a checkpoint give --config.init_from={value} and another --workdir"
            )
        aside = tempfile.mkdtemp(prefix="athanor-")
        atexit.register(shutil.rmtree, aside, ignore_errors=True)
        return Path(aside)
    if "://" in value:
        raise UserError(
            f"--workdir={value}: must be a directory; mount the bucket on every host (gcsfuse) and give the mount point"
        )
    path = Path(value)
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"--workdir={value}: {above} is a file, not a directory")
    if not os.access(above, os.W_OK):
        raise UserError(f"--workdir={value}: {above} may not be written to")
    return path


def _pretend(devices: int) -> None:
    """Must come before JAX sees its first device. Sets the environment too, for the processes this
    one starts.
    """
    if devices < 0:
        raise UserError(f"--pretend_devices={devices}: must be positive")
    if devices:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        )  # the last one counts
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # which has read JAX_PLATFORMS by then
            sys.modules["jax"].config.update("jax_platforms", "cpu")


def _join() -> None:
    """Joins the other processes of a run on several hosts. Must come before JAX sees its first
    device.
    """
    where = os.environ.get("ATHANOR_DISTRIBUTED", "")
    if not where:
        return
    import jax

    try:
        if where == "1":
            jax.distributed.initialize()
        else:
            address, process, processes = where.split(",")
            jax.distributed.initialize(
                coordinator_address=address, process_id=int(process), num_processes=int(processes)
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"ATHANOR_DISTRIBUTED={where}: the processes did not find each other ({error}); unset it for a run on one host"
        ) from error
