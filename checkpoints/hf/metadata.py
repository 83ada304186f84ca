"""Keeps a Hugging Face checkpoint's files beside tensors: config, tokenizer, template, licence.

A workdir has these files in its hf/ from the day the checkpoint is loaded until it is written back,
with a record of which tensors the checkpoint has, and of which type.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.hf.config import config_json, model_fields
from checkpoints.hf.config_keys import field_of
from checkpoints.hf.safetensors import DTYPE_NAMES, DTYPES, TensorFiles
from checkpoints.locations import HF_RECORD, hf_directory, run_directory
from data.tokenizer_files import load_tokenizer
from files import read_json, replacing, write_json
from model.config import ModelConfig

TENSOR_RECORD = "noted.json"  # in hf/: where the checkpoint is, and the types of its tensors
TENSOR_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"),
    *(".tmp", ".index.json"),
)
LARGEST_FILE = 64 * 2**20  # bytes of a file that may be something other than tensors


def keep_record(directory: Path, workdir: Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Copies what a checkpoint has besides tensors into workdir/hf.

    Args:
      directory: the checkpoint.
      workdir: the workdir of a run.
      dtypes: the type of each tensor, which is recorded with the files.
    """
    record = {
        "from": str(directory.resolve()),
        "tensors": {name: DTYPE_NAMES[dtype] for name, dtype in dtypes.items()},
    }
    with replacing(workdir / HF_RECORD) as target:
        _copy(_other_files(directory), target)
        write_json(target / TENSOR_RECORD, record, indent=1)


def inherit_record(origin: str, workdir: Path) -> None:
    """Gives a run that starts from hf:DIR, or from a run with a record, that record too."""
    if (workdir / HF_RECORD).exists():
        return
    directory = hf_directory(origin)
    if directory is not None:
        keep_record(directory, workdir, TensorFiles(directory).dtypes)
        return
    record = run_directory(origin) / HF_RECORD
    if record.exists():
        with replacing(workdir / HF_RECORD) as target:
            _copy(sorted(record.iterdir()), target)


def recorded_origin(workdir: Path) -> str:
    """Returns the directory whose record a workdir has, or "" if it has none."""
    return _tensor_record(workdir).get("from", "")


def recorded_dtypes(workdir: Path) -> dict[str, np.dtype]:
    """Returns the type of each tensor of the checkpoint that a run comes from.

    The result is empty if it comes from none.
    """
    tensors = _tensor_record(workdir).get("tensors", {})
    return {name: DTYPES[dtype] for name, dtype in tensors.items()}


def config_for(
    model: ModelConfig, record: Path | None, tensor_names: Iterable[str], dtypes: set[str]
) -> dict[str, Any]:
    """Returns the config.json of a model.

    That is the one that the model came with, if it still describes it, and otherwise a new one.

    Args:
      model: the model, with its vocabulary filled in.
      record: the directory of the config.json that it came with.
      tensor_names: the tensors that it came with.
      dtypes: the types of the tensors that are written; the widest of them is noted.

    Raises:
      UserError: a new config.json is needed, and no architecture can express the model.
    """
    dtype = "float32" if "float32" in dtypes else sorted(dtypes)[0]
    if record is None or not (record / "config.json").exists():
        return config_json(model, dtype)
    fields = model_fields(record, tensor_names)
    if any(field_of(model, name) != value for name, value in fields.items() if name != "dtype"):
        return config_json(model, dtype)
    config = read_json(record / "config.json")
    config.pop("quantization_config", None)  # float8 is read here, and not written
    return config | {name: dtype for name in ("dtype", "torch_dtype") if name in config}


def write_other_files(
    directory: Path, record: Path | None, workdir: Path | None, config: Mapping[str, Any]
) -> None:
    """Writes everything of a checkpoint but its tensors, config.json last.

    Args:
      directory: the checkpoint.
      record: a directory with the files that the model came with.
      workdir: the run whose tokenizer is written if there is no record.
      config: the keys of config.json.
    """
    if record is not None:
        written = ("config.json", TENSOR_RECORD)
        _copy([file for file in _other_files(record) if file.name not in written], directory)
    elif workdir is not None and (workdir / "tokenizer.json").exists():
        load_tokenizer(workdir / "tokenizer.json").save(directory / "tokenizer.json")
    write_json(directory / "config.json", config)


def _tensor_record(workdir: Path) -> dict[str, Any]:
    record = workdir / HF_RECORD / TENSOR_RECORD
    return read_json(record) if record.exists() else {}


def _other_files(directory: Path) -> list[Path]:
    """Returns the files of a checkpoint that are not tensors."""
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and not file.name.endswith(TENSOR_FILES)
        and file.stat().st_size <= LARGEST_FILE
    ]


def _copy(files: Iterable[Path], directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, directory / file.name)
