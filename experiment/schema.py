"""The config of a run: a ConfigDict as a person writes it becomes frozen, validated dataclasses.

Below experiment/ nobody sees a ConfigDict, a flag, or the whole config: each function takes the
sections it needs.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from data.config import DataConfig, TokenizerConfig
from errors import FieldChecks, UserError
from experiment.nearest import nearest
from experiment.renamed import RENAMED_VALUES, new_name
from model.config import ModelConfig
from model.mesh import MeshConfig
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from train.config import FinetuneConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole config, validated."""

    seed: int = 0
    # Workdir (or checkpoint directory) whose newest parameters to start from, or hf:DIR, a Hugging
    # Face checkpoint; "" starts fresh. Of the latter, and of runs that come from one, the model
    # section, tokenizer and chat template are the checkpoint's, whatever a config file says. Of
    # another run they are what the config leaves at its default.
    init_from: str = ""
    # What launch.pretrain and launch.finetune take of that run: "parameters" | "all": optimizer and
    # step too, for another schedule, and its place in the data where these are the same.
    init_state: str = "parameters"
    # A Python file that defines tasks of your own, each a class with a name; it is then "task:NAME"
    # in data.sources and reinforce.task (docs/reinforce.md).
    tasks: str = ""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    reinforce: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)

    def __post_init__(self):
        """Checks what no section can see alone."""
        check = FieldChecks(self, "config")
        check.one_of("init_state", ("parameters", "all"))
        is_run = self.init_from and not self.init_from.startswith("hf:")
        needs = "needs init_from, the workdir of a run (no hf:DIR): nothing else has an optimizer"
        check.that(self.init_state == "parameters" or bool(is_run), "init_state", needs)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}: must be at least 0 and below 2^32")
        has_indexer = self.model.indexer.n_heads > 0
        needs = "needs an indexer, and model.indexer.n_heads = 0 builds none"
        FieldChecks(self.train, "train").that(
            self.train.stage == "dense" or has_indexer, "stage", needs
        )
        FieldChecks(self.sampling, "sampling").that(
            self.sampling.attention != "sparse" or has_indexer,
            "attention",
            f"{needs} (use 'dense')",
        )


def default_config() -> Any:
    """Returns the defaults of every field, a ConfigDict: type checkers cannot know its fields."""
    return as_config_dict(dataclasses.asdict(Config()))


def as_config_dict(values: Mapping[str, Any], section: type = Config) -> ConfigDict:
    """Returns the values of a section as a ConfigDict, with its own sections as ConfigDicts.

    A field that is a mapping stays a dict: of a ConfigDict it would be a section, whose fields
    cannot be others and have no dots in their names.
    """
    kinds = typing.get_type_hints(section)
    nested = {
        name: as_config_dict(value, kinds[name])
        for name, value in values.items()
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kinds.get(name))
    }
    return ConfigDict(dict(values) | nested, convert_dict=False)


def parse(config: ConfigDict) -> Config:
    """Validates a config as `get_config()` returns it.

    Raises UserError, in one line that names the field, the value and what is allowed.
    """
    return build(Config, config, "config")


def build(cls: type, config: Mapping[str, Any] | ConfigDict, path: str) -> Any:
    """Returns a frozen dataclass made of the section of a config that has exactly its fields.

    Args:
      cls: fields annotated int, float (an int will do), bool, str, tuple[X, ...] (a list will do),
        Mapping[str, X], X | None, or another such dataclass.
      config: the section.
      path: where the section stands, for errors: "config.model".

    Raises:
      UserError: a field too many, a field missing, a value of another type, or whatever the
        dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return cls(**_values(fields, config, path))


def _values(fields: Mapping[str, Any], config: Any, path: str) -> dict[str, Any]:
    """Returns the value of each field of a section, as the annotations in `fields` want them."""
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(
            f"{path} = {config!r}: must be a section with the fields {', '.join(fields)}"
        )
    for name in config:
        if name not in fields:
            raise no_such_field(path, name, fields)
    for name in fields:
        if name not in config:
            field = f"{path}.{name}".removeprefix("config.")
            raise UserError(
                f"{path}.{name}: missing (`python -m launch.fields {field}` says what it means)"
            )
    return {name: _value(kind, config[name], f"{path}.{name}") for name, kind in fields.items()}


def _value(kind: Any, value: Any, path: str) -> Any:
    """Returns `value` as the annotation `kind` wants it. Raises UserError if it does not fit."""
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    if isinstance(kind, types.UnionType):
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        return None if value is None else _value(kind, value, path)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise must_be(tuple, value, path)
        return tuple(
            _value(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value)
        )
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise must_be(dict, value, path)
        item_kind = typing.get_args(kind)[1]
        return {name: _value(item_kind, item, f"{path}[{name!r}]") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: True is no int
        raise must_be(kind, value, path)
    now = RENAMED_VALUES.get(path.removeprefix("config."), {})
    if kind is str and value in now:
        raise UserError(f"{path} = {value!r}: is now {now[value]!r}")
    return value


def with_template_options(config: Config, options: str) -> Config:
    """Returns a config with switches of its chat template, a JSON object, unless there are none.

    Raises UserError if they are no JSON object, or the template is not the tokenizer's own.
    """
    if not options:
        return config
    data = dataclasses.replace(config.data, chat_template_options=options)
    return dataclasses.replace(config, data=data)


def must_be(kind: type, value: Any, path: str) -> UserError:
    """Returns the error about a value of the wrong type."""
    words = {
        int: "an int",
        tuple: """a tuple, such as "('a', 'b')\"""",
        dict: """a mapping of names, such as "{'answer': 1.0}\"""",
    }
    return UserError(f"{path} = {value!r}: must be {words.get(kind, f'a {kind.__name__}')}")


def no_such_field(path: str, name: str, fields: Iterable[str]) -> UserError:
    """Returns the error about a field that does not exist.

    It names the field's new name, or else the nearest field that does exist.
    """
    now = new_name(f"{path}.{name}".removeprefix("config."))
    if now is not None:
        return renamed_field(f"{path}.{name}", now)
    meant = nearest(name, fields)
    hint = f'did you mean "{meant}"?' if meant else f"has: {', '.join(fields)}"
    return UserError(f"{path}.{name}: no such field ({hint})")


def renamed_field(path: str, now: str) -> UserError:
    """Returns the error about a field by its old name, with the new one."""
    return UserError(f"{path}: no such field (it is now {now})")
