"""Config files and the overrides of a command line, read into one ConfigDict.

Whatever a person can get wrong there is one line.
"""

import ast
import contextlib
import importlib.util
import re
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from checkpoints.locations import HF_RECORD, hf_directory, run_directory
from errors import UserError
from experiment.model_source import with_hf_fields, with_model_of_run, with_recorded_model
from experiment.renamed import new_name, new_name_in
from experiment.schema import default_config, must_be, no_such_field, renamed_field
from experiment.workdir import recorded_config

REPOSITORY = Path(__file__).parents[1]


class ConfigSource(NamedTuple):
    """A config as the command line gives it.

    Attributes:
      path: PATH or PATH:ARGUMENT, the config file and what its get_config() is called with.
      overrides: the words `--config.a.b=VALUE`.
    """

    path: str
    overrides: tuple[str, ...]

    def read(self, workdir: Path | None = None) -> ConfigDict:
        """Returns the config with the overrides and with what a checkpoint decides.

        `workdir` is where the run is, or will be.
        """
        config = with_overrides(get_config(self.path), self.overrides)
        return with_checkpoint_fields(config, self.overrides, workdir)


def with_checkpoint_fields(
    config: ConfigDict, overrides: Sequence[str], workdir: Path | None = None
) -> ConfigDict:
    """Returns the config with what the checkpoint that `init_from` names decides.

    A Hugging Face checkpoint, or a run that comes from one, decides the model whatever the config
    says; another run of ours what the config leaves at its default. The command line has the last
    word. A run that has begun in `workdir` has all that in its own record: the run that it came
    from may have changed since, or be gone.
    """
    origin = str(config.get("init_from", ""))
    directory = hf_directory(origin)
    if directory is not None:
        return with_overrides(with_hf_fields(config, directory), overrides)
    if not origin:
        return config
    run = run_directory(origin)
    if workdir is not None and (workdir / "config.json").exists():
        begun: Any = recorded_config(workdir)
        if begun.init_from == origin:
            run = workdir
    if (run / HF_RECORD).exists():
        return with_overrides(with_recorded_model(config, recorded_config(run)), overrides)
    if (run / "config.json").exists():
        unsaid = with_model_of_run(config, recorded_config(run), default_config())
        return with_overrides(unsaid, overrides)
    return config


def base_config_from(origin: str) -> ConfigDict:
    """Returns the defaults of every field, with `origin` to start from.

    `with_checkpoint_fields` adds what the checkpoint decides.
    """
    config = default_config()
    config.init_from = origin
    return config


def get_config(source: str) -> ConfigDict:
    """Returns what `get_config()` of the config file `PATH[:ARGUMENT]` returns.

    Raises UserError for whatever is wrong with it, with the file and line.
    """
    module = load_config_module(source)
    path, colon, argument = source.partition(":")
    with errors_in(path):
        config = module.get_config(*[argument] if colon else [])
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{source}: get_config() must return a ConfigDict, not {type(config).__name__}"
        )
    return config


def load_config_module(source: str) -> types.ModuleType:
    """Runs the config file `PATH[:ARGUMENT]` and returns its module.

    Raises UserError if there is no such file, it fails, or it has no get_config().
    """
    path = source.partition(":")[0]
    if not config_path(path).is_file():
        stem = Path(path).stem
        known = experiments()
        nearest = [name for name in known if Path(name).stem in path or stem in name] or known
        raise UserError(
            f"--config={path}: no such file "
            f"(there is {', '.join(nearest) or 'nothing in configs/'})"
        )
    spec = importlib.util.spec_from_file_location("config", config_path(path))
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: must be a Python file")
    module = importlib.util.module_from_spec(spec)
    with errors_in(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: defines no get_config()")
    return module


def config_path(path: str) -> Path:
    """Returns where a config file is: in the working directory, or else in the repository.

    So configs/x.py is found from any directory.
    """
    here = Path(path)
    return here if here.is_file() else REPOSITORY / path


def experiments() -> list[str]:
    """Returns the config files in configs/ of the working directory, or else of the repository."""
    here = Path("configs")
    directory = here if here.is_dir() else REPOSITORY / "configs"
    names = sorted(path.stem for path in directory.glob("*.py"))
    return [f"configs/{name}.py" for name in names if name not in ("__init__", "base")]


@contextlib.contextmanager
def errors_in(path: str) -> Iterator[None]:
    """Turns whatever the config file raises into one line that says where in the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file = config_path(path).absolute()
        frames = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).absolute() == file
        ]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else 1
        words = _renamed_attribute(error) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}:{line}: {words}") from error


def _renamed_attribute(error: Exception) -> str | None:
    """Returns the answer to a config file that reads a field by its old name."""
    if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict):
        now = new_name_in(error.obj, error.name or "")
        if now is not None:
            return f"{error.name}: no such field (it is now {now})"
    return None


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the words `--config.a.b=VALUE` from the others; after `--` all words are others."""
    end = argv.index("--") if "--" in argv else len(argv)
    overrides = [word for word in argv[:end] if re.match(r"--?(no)?config\.", word)]
    return overrides, [word for word in argv[:end] if word not in overrides] + list(argv[end:])


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config with `--config.a.b=VALUE` applied.

    Each value is read by the type of the value that it replaces. Raises UserError for a field or
    value that does not fit.
    """
    replaced, mappings = {}, {}
    for word in overrides:
        name, equals, value = word.partition("=")
        dotted = name[name.index(".") + 1 :]
        present = _present_value(config, dotted)
        if not equals and not isinstance(present, bool):
            raise UserError(f"{word} needs a value: --config.{dotted}=VALUE")
        if isinstance(present, dict):
            mappings[dotted] = _mapping(value, f"config.{dotted}")
        replaced[f"config.{dotted}"] = (value, present)
    overrides = [
        word for word in overrides if word.partition("=")[0].partition(".")[2] not in mappings
    ]
    values = absl_flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=list(overrides)
        )
        values(["command", *overrides])
    except (absl_flags.Error, ValueError, TypeError, KeyError) as error:
        for path, (value, present) in replaced.items():
            if f"--{path}=" in str(error):
                raise must_be(type(present), value, path) from error
        raise UserError(str(error)) from error
    result = typing.cast(ConfigDict, values["config"].value)
    for dotted, mapping in mappings.items():
        section, _, field = dotted.rpartition(".")
        _present_value(result, section)[field] = mapping
    return result


def _mapping(text: str, path: str) -> dict[str, Any]:
    """Returns the mapping that a command line writes as Python does. Raises UserError."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise must_be(dict, text, path) from error
    if not isinstance(value, dict):
        raise must_be(dict, text, path)
    return value


def _present_value(config: ConfigDict, dotted: str) -> Any:
    """Returns the value of a field or section. Raises UserError if there is none."""
    present: Any = config
    path = "config"
    for part in dotted.split("."):
        if not isinstance(present, ConfigDict):
            raise UserError(f"{path}.{part}: no such field ({path} is {present!r}, not a section)")
        if part not in present:
            now = new_name(dotted)
            if now is not None and _has(config, now):
                raise renamed_field(f"config.{dotted}", now)
            raise no_such_field(path, part, present)
        present, path = present[part], f"{path}.{part}"
    return present


def _has(config: ConfigDict, dotted: str) -> bool:
    section: Any = config
    for part in dotted.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            return False
        section = section[part]
    return True
