"""A workdir belongs to one run: its config is recorded on first use and compared ever after."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import UserError
from experiment.schema import Config

# What may differ when a run goes on: how long, how often it speaks and saves, and what it runs on.
# The devices, the microbatches and what is kept for the backward pass change no equation, only
# rounding. More steps do stretch the cosine where train.cosine_steps = -1 takes what is left.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.max_to_keep",
    "train.microbatches",
    "model.remat",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
)


def record_config(workdir: Path, config: Config, command: str) -> None:
    """Makes `workdir` this run's own: writes config.json on first use, and refuses another run's
    directory ever after.

    Only the fields of MAY_CHANGE may differ when a run goes on; the newest are recorded.

    Raises:
      UserError: the directory belongs to another command, or to a config that differs; names the
        first field that does.
    """
    record = workdir / "config.json"
    ours = json.loads(
        json.dumps(dataclasses.asdict(config))
    )  # tuples become lists, as they are when read back
    if record.exists():
        there = _read(record)
        if there["command"] != command:
            raise UserError(
                f"{workdir} belongs to launch.{there['command']}; choose another --workdir for launch.{command}"
            )
        old, new = _flat(there["config"]), _flat(ours)
        for name in [*new, *(name for name in old if name not in new)]:
            if name not in MAY_CHANGE and old.get(name, "nothing") != new.get(name, "nothing"):
                change = (
                    f"{name}: {old.get(name, 'nothing')} there, {new.get(name, 'nothing')} here"
                )
                raise UserError(
                    f"{workdir} belongs to another config ({change}); choose another --workdir"
                )
        if old == new:
            return
    workdir.mkdir(parents=True, exist_ok=True)
    # Every process of a pod may come here at once, with the same words: each writes its own file,
    # and the last rename wins.
    unfinished = workdir / f".config.json.{uuid.uuid4().hex}"
    unfinished.write_text(json.dumps({"command": command, "config": ours}, indent=2) + "\n")
    os.replace(unfinished, record)


@contextlib.contextmanager
def open_workdir(workdir: Path, config: Config, command: str) -> Iterator[None]:
    """Claims `workdir` for what is done inside. A person's error before the first step leaves a new
    directory free, so that the next try may have another config.
    """
    new = not (workdir / "config.json").exists()
    record_config(workdir, config, command)
    try:
        yield
    except UserError:
        metrics = workdir / "metrics.jsonl"
        if new and not (metrics.exists() and metrics.stat().st_size):
            from data.tokenizer_files import TOKENIZER_FILES

            for name in ("config.json", *TOKENIZER_FILES):
                (workdir / name).unlink(missing_ok=True)
        raise


def recorded_config(workdir: Path) -> ConfigDict:
    """The config a run was claimed with, as a ConfigDict that may still be overridden; `parse` it.
    Raises UserError if there is none.
    """
    record = workdir / "config.json"
    if not record.exists():
        raise UserError(f"{workdir}: no config.json, so not the --workdir of a run")
    return ConfigDict(_tuples(_read(record)["config"]))


def _read(record: Path) -> dict[str, Any]:
    try:
        there = json.loads(record.read_text())
        return {"command": there["command"], "config": dict(there["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record}: not the record of a run; remove it or choose another --workdir"
        ) from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat
