"""Keeps a Hugging Face checkpoint's files beside tensors: config, tokenizer, template, licence.

A workdir has these files in its hf/ from the day the checkpoint is loaded until it is written back,
with a record of which tensors the checkpoint has, and of which type.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.hf.config import config_json, fields_of, model_fields
from checkpoints.hf.config_keys import WITHOUT_EFFECT, field_of, with_fields
from checkpoints.hf.safetensors import DTYPE_NAMES, DTYPES, TensorFiles
from checkpoints.locations import HF_RECORD, hf_directory, run_directory
from data.chat_template import TEMPLATE_FILE
from data.tokenizer import Tokenizer
from data.tokenizer_files import has_tokenizer
from errors import UserError
from files import read_json, replacing, write_json, write_text
from model.config import ModelConfig

TENSOR_RECORD = "noted.json"  # in hf/: where the checkpoint is, and the types of its tensors
TENSOR_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"),
    *(".tmp", ".index.json"),
)
# Keys that say the same in several ways: where one has changed, none of the others may stay.
SYNONYMS = (
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"},
    {"n_routed_experts", "num_local_experts", "num_experts"},
    {"first_k_dense_replace", "mlp_layer_types"},
    {"mlp_only_layers", "decoder_sparse_step"},
    {"layer_types", "full_attention_interval"},
    {"num_nextn_predict_layers", "num_mtp_layers"},
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
    model: ModelConfig,
    record: Path | None,
    tensor_names: Iterable[str],
    written: Iterable[str],
    dtypes: set[str],
) -> dict[str, Any]:
    """Returns the config.json of a model.

    That is the one that the model came with, with other values of what has changed; or a new one.

    Args:
      model: the model, with its vocabulary filled in.
      record: the directory of the config.json that it came with.
      tensor_names: the tensors that it came with.
      written: the tensors that are written.
      dtypes: the types of the tensors that are written; the widest of them is noted.

    Raises:
      UserError: a new config.json is needed, and no architecture can express the model.
    """
    dtype = "float32" if "float32" in dtypes else sorted(dtypes)[0]
    if record is None or not (record / "config.json").exists():
        return config_json(model, dtype)
    keys = read_json(record / "config.json")
    fields = model_fields(record, tensor_names)
    fields["dtype"] = model.dtype
    keys.pop("quantization_config", None)  # float8 is read here, and not written
    if with_fields(model, fields) != model:
        keys = _rewritten(keys, config_json(with_fields(model, fields), ""), model, written)
    names = [name for name in ("dtype", "torch_dtype") if name in keys]
    return keys | dict.fromkeys(names, dtype)


def _rewritten(
    keys: Mapping[str, Any], before: Mapping[str, Any], model: ModelConfig, written: Iterable[str]
) -> dict[str, Any]:
    """Returns the keys of a config.json with other values of those that have changed.

    Args:
      keys: all keys of the config.json.
      before: those that decide the model, as we write them.
      model: the model that they are to describe.
      written: the tensors that are written.
    """
    after = config_json(model, "")
    if "max_position_embeddings" in before:  # by YaRN, which the model may have no longer
        context = model.rope.original_max_position_embeddings
        after.setdefault("max_position_embeddings", context)
    changed = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    for same in SYNONYMS:
        if changed & same:
            changed |= same
    # Keys that have not changed are written too, by the name that most readers know.
    rewritten = after | {name: value for name, value in keys.items() if name not in changed}
    if "architectures" not in changed and _describes(rewritten, model, written):
        return rewritten
    # Keys of another architecture, or a spelling that is only read: what is left is what changes
    # no result.
    kept = {name: value for name, value in keys.items() if name in WITHOUT_EFFECT - {"auto_map"}}
    return kept | after


def _describes(keys: Mapping[str, Any], model: ModelConfig, written: Iterable[str]) -> bool:
    """Returns whether the keys of a config.json are read as this model."""
    try:
        fields = fields_of(keys, Path("config.json"), written)
    except UserError:
        return False
    return all(
        # Magnitudes go through a logarithm.
        math.isclose(field_of(model, name), value, rel_tol=1e-9)
        if isinstance(value, float)
        else field_of(model, name) == value
        for name, value in fields.items()
        if name != "dtype"
    )


def write_other_files(
    directory: Path,
    record: Path | None,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    config: Mapping[str, Any],
) -> None:
    """Writes everything of a checkpoint but its tensors, config.json last.

    Args:
      directory: the checkpoint.
      record: a directory with the files that the model came with.
      tokenizer: is written if there is none among those.
      chat_template: the Jinja that is written with it if it has none of its own.
      config: the keys of config.json.
    """
    files = [] if record is None else _other_files(record)
    _copy([file for file in files if file.name not in ("config.json", TENSOR_RECORD)], directory)
    if tokenizer is not None and (record is None or not has_tokenizer(record)):
        tokenizer.save(directory / "tokenizer.json")
        write_json(directory / "generation_config.json", tokenizer.token_ids)
        if tokenizer.chat_template is None and chat_template is not None:
            write_text(directory / TEMPLATE_FILE, chat_template)
        config = {**config, **tokenizer.token_ids}
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
