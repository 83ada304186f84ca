"""A workdir belongs to one run: its config is recorded on first use and compared ever after."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from checkpoints.locations import LORA_RECORD, REFERENCE_RECORD, hf_directory, run_directory
from data.tokenizer_files import TOKENIZER_FILES
from errors import UserError
from experiment.lock import locked
from experiment.renamed import with_new_names
from experiment.schema import Config, as_config_dict
from files import write_json
from model.mesh import MESH_AXES
from rl.config import EvaluateConfig

# The fields that may differ when a run goes on: how long, what it logs and saves, how it is
# evaluated, how long prompts may be, and what it runs on, a server that samples included. The
# devices, the microbatches and what is kept for the backward pass change no equation, only
# rounding. More steps do stretch the cosine where train.cosine_steps = -1 takes what is left.
MAY_CHANGE = (
    "data.bad_records",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.max_to_keep",
    "train.microbatches",
    "train.sinks",
    "sampling.max_prompt_tokens",
    "sampling.filter_overlong_prompts",
    "sampling.server",
    "sampling.server_api",
    "sampling.server_weights",
    "sampling.server_timeout",
    "sampling.server_retries",
    "sampling.server_seeds",
    "reinforce.trace_completions",
    *(f"evaluate.{field.name}" for field in dataclasses.fields(EvaluateConfig)),
    "model.remat",
    *(f"mesh.{axis}" for axis in MESH_AXES),
)

PASS_RATES = "pass_rates.json"  # what experiment/pass_rates.py keeps of an evaluation

# Orbax and the libraries below it read these as patterns, in parts of a path too.
PATTERN = "*?[]\\"


def record_config(workdir: Path, config: Config, command: str) -> None:
    """Makes `workdir` this run's own.

    Writes config.json on first use, and refuses another run's directory ever after. Only the fields
    of MAY_CHANGE may differ when a run goes on; the newest are recorded.

    Raises:
      UserError: the directory belongs to another command, or to a config that differs; names the
        first field that does.
    """
    record = workdir / "config.json"
    # Tuples become lists, as they are when read back.
    ours = {"command": command, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
    if record.exists():
        written = _read(record)
        if written == ours:
            return
        _refuse_another_run(workdir, written, ours)
    # Every process of a pod may come here at once, with the same words: the last rename wins.
    write_json(record, ours)


def _refuse_another_run(workdir: Path, written: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError if the workdir has a run of another command or another config."""
    if written["command"] != ours["command"]:
        raise UserError(
            f"{workdir} belongs to launch.{written['command']}; choose another --workdir for "
            f"launch.{ours['command']}"
        )
    old, new = _flat(_present(written["config"])), _flat(ours["config"])
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in MAY_CHANGE and old.get(name, "nothing") != new.get(name, "nothing"):
            change = f"{name}: {old.get(name, 'nothing')} there, {new.get(name, 'nothing')} here"
            raise UserError(
                f"{workdir} belongs to another config ({change}); choose another --workdir"
            )


@contextlib.contextmanager
def open_workdir(workdir: Path, config: Config, command: str) -> Iterator[None]:
    """Locks `workdir` and records the config in it for what is done inside.

    A person's error before the first step leaves a new directory free, so that the next try may
    have another config.
    """
    with locked(workdir):
        new = not (workdir / "config.json").exists()
        record_config(workdir, config, command)
        try:
            yield
        except UserError:
            metrics = workdir / "metrics.jsonl"
            if new and not (metrics.exists() and metrics.stat().st_size):
                records = LORA_RECORD, REFERENCE_RECORD, PASS_RATES
                for name in ("config.json", *records, *TOKENIZER_FILES):
                    (workdir / name).unlink(missing_ok=True)
            raise


def recorded_config(workdir: Path) -> ConfigDict:
    """Returns the config recorded in a run's workdir, which may still be overridden; `parse` it.

    A field that did not exist yet has its default. Raises UserError if there is no record.
    """
    record = workdir / "config.json"
    if not record.exists():
        raise UserError(f"{workdir}: no config.json, so not the --workdir of a run")
    return as_config_dict(_with_tuples(_present(_read(record)["config"])))


def command_of(place: str | Path) -> str:
    """Returns the command whose run a workdir has, such as "finetune"; "" where none is recorded.

    `place` may be anything that `init_from` may be: hf:DIR has no command.
    """
    record = run_directory(place) / "config.json"
    if hf_directory(place) is not None or not record.exists():
        return ""
    return str(_read(record)["command"])


def checked_workdir(value: str, *, reads: bool, writes: bool) -> Path:
    """Returns the directory that --workdir names. It may not exist yet.

    Args:
      value: the flag's value.
      reads: whether the command reads a model there. It may then be a Hugging Face checkpoint as it
        is, hf:DIR, to which nothing is written: a temporary directory takes the results.
      writes: whether it must be possible to write there. What is read may lie on a disk that is
        read-only.

    Raises:
      UserError: the value is missing, no directory, or one that may not be written to; or the name
        has characters that other libraries take for something else.
    """
    if not value:
        raise UserError(
            "--workdir is missing: say where this run keeps what it writes, such as "
            "--workdir=runs/first"
        )
    if hf_directory(value):
        if not reads:
            raise UserError(
                f"--workdir={value}: this command writes there; to start from a checkpoint give "
                f"--config.init_from={value} and another --workdir"
            )
        temporary = tempfile.mkdtemp(prefix="athanor-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)
    if "://" in value:
        raise UserError(
            f"--workdir={value}: must be a directory; mount the bucket on every host (gcsfuse) and "
            "give the mount point"
        )
    path = Path(value)
    _refuse_patterns(value, path)
    try:
        above = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise UserError(f"--workdir={value}: {error.strerror}") from error
    if not above.is_dir():
        raise UserError(f"--workdir={value}: {above} is a file, not a directory")
    if max(len(os.fsencode(part)) for part in path.absolute().parts) > os.pathconf(
        above, "PC_NAME_MAX"
    ):
        raise UserError(f"--workdir={value}: File name too long")
    if writes and not os.access(above, os.W_OK):
        raise UserError(f"--workdir={value}: {above} may not be written to")
    return path


def _refuse_patterns(value: str, path: Path) -> None:
    """Raises UserError for a path that Orbax would take for a pattern, or that is no text.

    A run could be saved in such a place and not be read again, or a place of another name could be
    read.
    """
    whole = str(path.absolute())
    wrong = sorted({letter for letter in whole if letter in PATTERN or ord(letter) < 32})
    wrong += [letter for letter in whole if "\ud800" <= letter <= "\udfff"]
    if wrong:
        raise UserError(
            f"--workdir={value!r}: {wrong[0]!r} may not be in the path of a workdir, since "
            "libraries read it as a pattern; choose another name"
        )


def _read(record: Path) -> dict[str, Any]:
    """Reads {"command", "config"} as they are in the file."""
    try:
        written = json.loads(record.read_text())
        return {"command": written["command"], "config": dict(written["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record}: not the record of a run; remove it or choose another --workdir"
        ) from error


def _present(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recorded config with the names and fields that configs have now."""
    return _over(Config(), with_new_names(recorded))


def _over(defaults: Any, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recorded fields of a section, and the defaults of those that are not recorded."""
    filled = json.loads(json.dumps(dataclasses.asdict(defaults))) | dict(recorded)
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default) and isinstance(filled[field.name], Mapping):
            filled[field.name] = _over(default, filled[field.name])
    return filled


def _with_tuples(value: Any) -> Any:
    """Returns the value with tuples where JSON has lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a config by dotted name."""
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
