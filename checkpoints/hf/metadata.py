"""What a Hugging Face checkpoint has besides tensors, kept in a workdir's hf/ from the day it is
loaded until it is written back: its config.json, tokenizer, template, licence; and of its tensors
which there were, and of what type.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.hf.architecture import model_fields, read_json
from checkpoints.hf.describe import config_json
from checkpoints.hf.safetensors import DTYPES
from checkpoints.locations import RECORD, hf_directory, run_directory
from model.config import ModelConfig

NOTED = "noted.json"  # beside them, by us
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".tmp",
    ".index.json",
)
LARGEST = 64 * 2**20  # bytes of a file that is not weights


def keep_record(directory: Path, workdir: Path, types: dict[str, np.dtype]) -> None:
    """Copies into workdir/hf what `directory` has besides weights, and notes the type of each
    tensor and where it all came from.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    noted = {
        "from": str(directory.resolve()),
        "tensors": {name: names[dtype] for name, dtype in types.items()},
    }
    _replace(workdir / RECORD, _beside(directory), {NOTED: json.dumps(noted, indent=1) + "\n"})


def comes_from(workdir: Path) -> str:
    """The directory whose record a workdir has; "" if it has none."""
    return (
        read_json(workdir / RECORD / NOTED)["from"] if (workdir / RECORD / NOTED).exists() else ""
    )


def inherit_record(origin: str, workdir: Path) -> None:
    """A run that starts from hf:DIR, or from a run that has a record, has it too."""
    directory = hf_directory(origin)
    if (workdir / RECORD).exists():
        return
    if directory is not None:
        from checkpoints.hf.safetensors import TensorFiles

        keep_record(
            directory,
            workdir,
            {name: info.dtype for name, info in TensorFiles(directory).tensors.items()},
        )
    elif (run_directory(origin) / RECORD).exists():
        _replace(workdir / RECORD, sorted((run_directory(origin) / RECORD).iterdir()), {})


def tensor_types(workdir: Path) -> dict[str, np.dtype]:
    """Of each tensor of the checkpoint that a run comes from; empty if it comes from none."""
    noted = workdir / RECORD / NOTED
    return (
        {name: DTYPES[dtype] for name, dtype in read_json(noted)["tensors"].items()}
        if noted.exists()
        else {}
    )


def config_for(
    model: ModelConfig, record: Path | None, names: Iterable[str], types: set[str]
) -> dict[str, Any]:
    """The config.json of a model: the one it came with if that still describes it, and a new one if
    not.

    Args:
      record: the directory of the one it came with.
      names: of the tensors that it came with.
      types: of those that are written; the widest is noted.
    """
    dtype = "float32" if "float32" in types else sorted(types)[0]
    if record is None or not (record / "config.json").exists():
        return config_json(model, dtype)
    config, fields = read_json(record / "config.json"), model_fields(record, names)
    if any(_field(model, name) != value for name, value in fields.items() if name != "dtype"):
        return config_json(model, dtype)
    config.pop("quantization_config", None)  # float8 is read here, and not written
    return config | {name: dtype for name in ("dtype", "torch_dtype") if name in config}


def write_beside(
    directory: Path, record: Path | None, workdir: Path | None, config: dict[str, Any]
) -> None:
    """Everything of a checkpoint but its tensors: config.json last. Without a record, a run's own
    tokenizer.
    """
    from data.tokenizer_files import load_tokenizer

    if record is not None:
        for file in _beside(record):
            if file.name not in ("config.json", NOTED):
                shutil.copyfile(file, directory / file.name)
    elif workdir is not None and (workdir / "tokenizer.json").exists():
        load_tokenizer(workdir / "tokenizer.json").save(directory / "tokenizer.json")
    unfinished = directory / f".config.json.{uuid.uuid4().hex}"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(unfinished, directory / "config.json")


def _field(model: ModelConfig, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _beside(directory: Path) -> list[Path]:
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.stat().st_size <= LARGEST
    ]


def _replace(target: Path, files: list[Path], written: dict[str, str]) -> None:
    """A directory with these files in it, whole or not there."""
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, unfinished / file.name)
    for name, text in written.items():
        (unfinished / name).write_text(text)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)
