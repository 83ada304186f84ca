"""Finds the config of a command: five kinds of input.

Each kind has the flags that name it, and the arguments that `run` gets of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from checkpoints.locations import hf_directory
from errors import UserError
from experiment.config_files import (
    ConfigSource,
    base_config_from,
    experiments,
    with_checkpoint_fields,
    with_overrides,
)
from experiment.flags import Flag
from experiment.processes import join_processes
from experiment.schema import Config, parse
from experiment.workdir import recorded_config

OVERRIDES = "--config.a.b=VALUE overrides a field"


class Input:
    """Gives a command no config; the other kinds of input refine this one."""

    # Whether there is a config: its fields may be overridden, and it runs on devices.
    has_config = False

    def flags(self) -> dict[str, Flag]:
        """Returns the flags that this input needs."""
        return {}

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises UserError if a flag is missing."""

    def reads_workdir(self, values: Mapping[str, Any]) -> bool:
        """Returns whether the config is that of the model in --workdir.

        --workdir then may be a Hugging Face checkpoint.
        """
        return False

    def resolve(
        self, values: Mapping[str, Any], overrides: Sequence[str], workdir: Path | None
    ) -> dict[str, Any]:
        """Returns the keyword arguments of `run` that this input gives.

        Args:
          values: the flags' values.
          overrides: the words `--config.a.b=VALUE`.
          workdir: the directory to write to, if the command has one.

        Raises:
          UserError: whatever is wrong with the config.
        """
        return {}


class File(Input):
    """The config is a config file with overrides."""

    has_config = True
    help = f"experiment, configs/x.py or configs/x.py:ARGUMENT; {OVERRIDES}"

    def flags(self) -> dict[str, Flag]:
        """Returns --config."""
        return {"config": Flag("", self.help)}

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises UserError if --config is missing."""
        if not values["config"]:
            known = " or ".join(experiments()) or "configs/x.py"
            raise UserError(f"--config is missing: name an experiment, such as {known}")

    def resolve(
        self, values: Mapping[str, Any], overrides: Sequence[str], workdir: Path | None
    ) -> dict[str, Any]:
        """Returns the validated config."""
        source = ConfigSource(values["config"], tuple(overrides))
        return {"config": validated(source.read(workdir), source.path)}


class UnreadFile(File):
    """The config is a config file that the command reads itself, as a ConfigSource."""

    def resolve(
        self, values: Mapping[str, Any], overrides: Sequence[str], workdir: Path | None
    ) -> dict[str, Any]:
        """Returns the config as a ConfigSource."""
        return {"config": ConfigSource(values["config"], tuple(overrides))}


class Recorded(File):
    """The config is a config file, or without one that of the run in --workdir."""

    help = (
        "a config file in place of the one recorded in --workdir (or, of hf:DIR, that of its "
        f"config.json); {OVERRIDES}"
    )

    def check(self, values: Mapping[str, Any]) -> None:
        """Accepts a missing --config."""

    def reads_workdir(self, values: Mapping[str, Any]) -> bool:
        """Returns whether --config is missing."""
        return not values["config"]

    def resolve(
        self, values: Mapping[str, Any], overrides: Sequence[str], workdir: Path | None
    ) -> dict[str, Any]:
        """Returns the validated config of the file, or of the run in --workdir."""
        if values["config"]:
            return super().resolve(values, overrides, workdir)
        return {"config": validated(model_config(values["workdir"], overrides), workdir)}


class Model(Input):
    """The config is that of a model: the workdir of a run, or hf:DIR.

    `run` gets the model as `model` too.
    """

    has_config = True

    def flags(self) -> dict[str, Flag]:
        """Returns --model."""
        model = (
            "the workdir of a run, or hf:DIR, a Hugging Face checkpoint; --config.a.b=VALUE "
            "overrides a field of its config"
        )
        return {"model": Flag("", model)}

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises UserError if --model is missing."""
        if not values["model"]:
            raise UserError(
                "--model is missing: give the workdir of a run, or hf:DIR for a Hugging Face "
                "checkpoint"
            )

    def resolve(
        self, values: Mapping[str, Any], overrides: Sequence[str], workdir: Path | None
    ) -> dict[str, Any]:
        """Returns the model and its validated config."""
        origin = values["model"]
        return {"model": origin, "config": validated(model_config(origin, overrides), origin)}


INPUTS = {
    "none": Input(),
    "file": File(),
    "source": UnreadFile(),
    "recorded": Recorded(),
    "model": Model(),
}


def model_config(origin: str, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config recorded in a run's workdir, or what config.json of `hf:DIR` says."""
    if hf_directory(origin):
        base, workdir = base_config_from(origin), None
    else:
        base, workdir = recorded_config(Path(origin)), Path(origin)
    return with_checkpoint_fields(with_overrides(base, overrides), overrides, workdir)


def validated(config: ConfigDict, name: object) -> Config:
    """Joins the other processes of the run and parses a config; its errors begin with `name`."""
    join_processes()
    try:
        return parse(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
