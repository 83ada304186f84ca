"""The door: a ConfigDict comes in, frozen dataclasses go on. Below launch/ nobody sees a ConfigDict or a flag."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import types
import typing
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from data.config import DataConfig, TokenizerConfig
    from model.config import ModelConfig
    from model.sharding import MeshConfig
    from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
    from train.config import TrainConfig

# What may differ when a run goes on: how long, how often it speaks and saves, and what it runs on. The devices, the microbatches and what is kept for the
# backward pass change no equation, only rounding. More steps do stretch the cosine where train.cosine_steps = -1 takes what is left.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.keep",
    "train.microbatches",
    "model.remat",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole config, validated. Its sections are those of configs/base.py."""

    seed: int
    init_from: str
    tokenizer: TokenizerConfig
    model: ModelConfig
    mesh: MeshConfig
    data: DataConfig
    train: TrainConfig
    sampling: SamplingConfig
    reinforce: ReinforceConfig
    evaluate: EvaluateConfig

    def __post_init__(self):
        """What no section can see alone."""
        if self.train.stage != "dense" and self.model.indexer.heads == 0:
            raise UserError(f"train.stage = {self.train.stage!r}: needs an indexer, and model.indexer.heads = 0 builds none")
        if self.sampling.attention == "sparse" and self.model.indexer.heads == 0:
            raise UserError("sampling.attention = 'sparse': needs an indexer, and model.indexer.heads = 0 builds none (use 'dense')")
        if self.data.batch % self.train.microbatches:
            raise UserError(f"train.microbatches = {self.train.microbatches}: does not divide data.batch = {self.data.batch}")


def parse(config: ConfigDict) -> Config:
    """Validates a config as `get_config()` returns it. Raises UserError, in one line that names the field, the value and what is allowed."""
    # Here and not above: model.sharding brings jax, and `--help` must not wait for it.
    from data.config import DataConfig, TokenizerConfig
    from model.config import ModelConfig
    from model.sharding import MeshConfig
    from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
    from train.config import TrainConfig

    fields = {
        "seed": int,
        "init_from": str,
        "tokenizer": TokenizerConfig,
        "model": ModelConfig,
        "mesh": MeshConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "sampling": SamplingConfig,
        "reinforce": ReinforceConfig,
        "evaluate": EvaluateConfig,
    }
    return Config(**_values(fields, config, "config"))


def build(cls: type, config: Mapping[str, Any], path: str) -> Any:
    """A frozen dataclass from the section of a config that has exactly its fields.

    Args:
      cls: fields annotated int, float (an int will do), bool, str, tuple[X, ...] (a list will do), X | None, or another such dataclass.
      config: the section.
      path: where the section stands, for errors: "config.model".

    Raises:
      UserError: a field too many, a field missing, a value of another type, or whatever the dataclass itself refuses.
    """
    return cls(**_values(typing.get_type_hints(cls), config, path))


def _values(fields: Mapping[str, Any], config: Any, path: str) -> dict[str, Any]:
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"{path} = {config!r}: must be a section with the fields {', '.join(fields)}")
    for name in config:
        if name not in fields:
            raise no_such_field(path, name, fields)
    for name in fields:
        if name not in config:
            raise UserError(f"{path}.{name}: missing (configs/base.py says what it means)")
    return {name: _value(kind, config[name], f"{path}.{name}") for name, kind in fields.items()}


def _value(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `kind` wants it; UserError if it does not fit."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if isinstance(kind, types.UnionType):
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        return None if value is None else _value(kind, value, path)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise must_be(tuple, value, path)
        return tuple(_value(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: True is no int
        raise must_be(kind, value, path)
    return value


def must_be(kind: type, value: Any, path: str) -> UserError:
    """The error about a value of the wrong type."""
    words = {int: "an int", tuple: """a tuple, such as "('a', 'b')\""""}
    return UserError(f"{path} = {value!r}: must be {words.get(kind, f'a {kind.__name__}')}")


def no_such_field(path: str, name: str, fields: Iterable[str]) -> UserError:
    """The error about a field that does not exist, with the nearest that does."""
    nearest = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"?' if nearest else f"has: {', '.join(fields)}"
    return UserError(f"{path}.{name}: no such field ({hint})")


def claim(workdir: Path, config: Config, command: str) -> None:
    """Makes `workdir` this run's own: writes config.json on first use, and refuses another run's directory ever after.

    Only the fields of MAY_CHANGE may differ when a run goes on; the newest are recorded.

    Raises:
      UserError: the directory belongs to another command, or to a config that differs; names the first field that does.
    """
    record = workdir / "config.json"
    ours = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as they are when read back
    if record.exists():
        there = _read(record)
        if there["command"] != command:
            raise UserError(f"{workdir} belongs to launch.{there['command']}; choose another --workdir for launch.{command}")
        old, new = _flat(there["config"]), _flat(ours)
        for name in [*new, *(name for name in old if name not in new)]:
            if name not in MAY_CHANGE and old.get(name, "nothing") != new.get(name, "nothing"):
                change = f"{name}: {old.get(name, 'nothing')} there, {new.get(name, 'nothing')} here"
                raise UserError(f"{workdir} belongs to another config ({change}); choose another --workdir")
        if old == new:
            return
    workdir.mkdir(parents=True, exist_ok=True)
    # Every process of a pod may come here at once, with the same words: each writes its own file, and the last rename wins.
    unfinished = workdir / f".config.json.{uuid.uuid4().hex}"
    unfinished.write_text(json.dumps({"command": command, "config": ours}, indent=2) + "\n")
    os.replace(unfinished, record)


@contextlib.contextmanager
def claimed(workdir: Path, config: Config, command: str) -> Iterator[None]:
    """Claims `workdir` for what is done inside. A person's error before the first step leaves a new directory free, so that the next try may have another
    config."""
    new = not (workdir / "config.json").exists()
    claim(workdir, config, command)
    try:
        yield
    except UserError:
        metrics = workdir / "metrics.jsonl"
        if new and not (metrics.exists() and metrics.stat().st_size):
            from data.tokenizer import TOKENIZER_FILES

            for name in ("config.json", *TOKENIZER_FILES):
                (workdir / name).unlink(missing_ok=True)
        raise


def recorded(workdir: Path) -> ConfigDict:
    """The config a run was claimed with, as a ConfigDict that may still be overridden; `parse` it. Raises UserError if there is none."""
    record = workdir / "config.json"
    if not record.exists():
        raise UserError(f"{workdir}: no config.json, so not the --workdir of a run")
    return ConfigDict(_tuples(_read(record)["config"]))


def _read(record: Path) -> dict[str, Any]:
    try:
        there = json.loads(record.read_text())
        return {"command": there["command"], "config": dict(there["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: not the record of a run; remove it or choose another --workdir") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def summarise(config: Config, parameters_total: int, parameters_active: int, mesh: Mesh, *, trains: bool) -> None:
    """Prints what is about to run, in a few lines, once per run: process 0 alone speaks. `parameters_active` counts what one token goes through."""
    import jax
    from rich.console import Console
    from rich.table import Table

    if jax.process_index() != 0:
        return
    model, data, train = config.model, config.data, config.train
    routed = f"{model.moe.experts} experts, {model.moe.chosen} chosen + {model.moe.shared} shared" if model.moe_layers else "no experts"
    attention = ", ".join(f"{sum(kind.attention == name for kind in model.kinds)} {name}" for name in dict.fromkeys(kind.attention for kind in model.kinds))
    devices = mesh.devices.size
    rows = {
        "model": f"{model.layers} layers ({attention}; {model.layers - model.moe_layers} dense) x {model.width} wide, {routed}",
        "parameters": f"{parameters_total:,} total, {parameters_active:,} active",
        "mesh": f"{' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}: {devices} {mesh.devices.flat[0].platform} device{'s' * (devices > 1)}",
    }
    if trains:
        rows["data"] = f"{', '.join(data.sources)}; {data.batch} x {data.sequence} = {data.batch * data.sequence:,} tokens a step"
        rows["train"] = f"{train.stage}, {train.steps:,} steps, learning rate {train.learning_rate:g}, seed {config.seed}"
    console = Console(highlight=False)
    table = Table(show_header=False, title="config", title_justify="left") if console.is_terminal else None
    for name, value in rows.items():
        if table is None:
            print(f"{name:<12}{value}", flush=True)
        else:
            table.add_row(name, value)
    if table is not None:
        console.print(table)
