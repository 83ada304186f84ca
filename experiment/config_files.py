"""A config file and the overrides of a command line become one ConfigDict. Whatever a person can
get wrong there is one line.
"""

import contextlib
import importlib.util
import re
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from checkpoints.locations import RECORD, hf_directory, run_directory
from errors import UserError
from experiment.model_source import with_hf_fields, with_recorded_model
from experiment.schema import default_config, must_be, no_such_field
from experiment.workdir import recorded_config


class Source(NamedTuple):
    """A config as the command line gives it: PATH[:ARGUMENT], and the words
    `--config.a.b=VALUE`.
    """

    path: str
    overrides: tuple[str, ...]

    def read(self) -> ConfigDict:
        return with_checkpoint_fields(
            with_overrides(get_config(self.path), self.overrides), self.overrides
        )


def with_checkpoint_fields(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """With what the checkpoint that `init_from` names decides, if that is a Hugging Face one or
    comes from one; the command line has the last word.
    """
    origin = config.get("init_from", "")
    directory = hf_directory(origin)
    if directory is not None:
        return with_overrides(with_hf_fields(config, directory), overrides)
    if origin and (run_directory(origin) / RECORD).exists():
        return with_overrides(
            with_recorded_model(config, recorded_config(run_directory(origin))), overrides
        )
    return config


def get_config(source: str) -> ConfigDict:
    """What `get_config()` of the config file `PATH[:ARGUMENT]` returns. Raises UserError for
    whatever is wrong with it, with the file and line.
    """
    module = load_config_module(source)
    _, colon, argument = source.partition(":")
    with errors_in(source.partition(":")[0]):
        config = module.get_config(*[argument] if colon else [])
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{source}: get_config() must return a ConfigDict, not {type(config).__name__}"
        )
    return config


def base_config_from(origin: str) -> ConfigDict:
    """Returns the defaults with `init_from` set; `with_checkpoint_fields` does the rest."""
    config = default_config()
    config.init_from = origin
    return config


def load_config_module(source: str) -> types.ModuleType:
    """The module of the config file `PATH[:ARGUMENT]`. Raises UserError if there is none, it fails,
    or it has no get_config().
    """
    path = source.partition(":")[0]
    if not Path(path).is_file():
        nearest = [
            name for name in experiments() if Path(name).stem in path or Path(path).stem in name
        ] or experiments()
        raise UserError(
            f"--config={path}: no such file (there is {', '.join(nearest) or 'nothing in configs/'})"
        )
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None:
        raise UserError(f"--config={path}: must be a Python file")
    module = importlib.util.module_from_spec(spec)
    with errors_in(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: defines no get_config()")
    return module


def experiments() -> list[str]:
    return [
        str(path)
        for path in sorted(Path("configs").glob("*.py"))
        if path.stem not in ("__init__", "base")
    ]


@contextlib.contextmanager
def errors_in(path: str) -> Iterator[None]:
    """Turns whatever the config file raises into one line that says where in the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).absolute() == Path(path).absolute()
        ]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else 1
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `--config.a.b=VALUE` from the other words before `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    overrides = [word for word in argv[:end] if re.match(r"--?(no)?config\.", word)]
    return overrides, [word for word in argv[:end] if word not in overrides] + list(argv[end:])


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config with `--config.a.b=VALUE` applied, each read by the type of the value it replaces.
    Raises UserError for a field or value that does not fit.
    """
    replaced = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        there, path = config, "config"
        for part in name[name.index(".") + 1 :].split("."):
            if not isinstance(there, ConfigDict):
                raise UserError(
                    f"{path}.{part}: no such field ({path} is {there!r}, not a section)"
                )
            if part not in there:
                raise no_such_field(path, part, there)
            there, path = there[part], f"{path}.{part}"
        if not equals and not isinstance(there, bool):
            raise UserError(f"{word} needs a value: --{path}=VALUE")
        replaced[path] = (value, there)
    values = absl_flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=list(overrides)
        )
        values(["command", *overrides])
    except (absl_flags.Error, ValueError, TypeError, KeyError) as error:
        for path, (value, there) in replaced.items():
            if f"--{path}=" in str(error):
                raise must_be(type(there), value, path) from error
        raise UserError(str(error)) from error
    return values["config"].value
