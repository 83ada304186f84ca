"""The model that a config.json describes, and the config.json of a model.

The architecture that config.json names decides how the rest is read. Where a key may be missing,
its default is that of transformers. tests/golden checks what is read here against transformers.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.hf import deepseek, fp8, qwen3
from checkpoints.hf.config_keys import ConfigReader, ConfigWriter, Key
from errors import UserError
from files import read_json
from model.config import ModelConfig

SHARED_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_hidden_layers", "num_hidden_layers"),
    Key("intermediate_size", "intermediate_size"),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("rms_norm_eps", "rms_norm_eps", 1e-6),
)


class Architecture(NamedTuple):
    """Holds the functions that read and write the config.json of one family of models."""

    model_type: str
    read: Callable[[ConfigReader, Iterable[str]], dict[str, Any]]
    write: Callable[[ConfigWriter], dict[str, Any]]


ARCHITECTURES = {
    "DeepseekV3ForCausalLM": Architecture("deepseek_v3", deepseek.read_v3, deepseek.write_v3),
    "DeepseekV32ForCausalLM": Architecture("deepseek_v32", deepseek.read_v32, deepseek.write_v32),
    "Qwen3ForCausalLM": Architecture("qwen3", qwen3.read_qwen3, qwen3.write_qwen3),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", qwen3.read_qwen3_moe, qwen3.write_qwen3_moe),
    "Qwen3NextForCausalLM": Architecture(
        "qwen3_next", qwen3.read_qwen3_next, qwen3.write_qwen3_next
    ),
}


def model_fields(directory: Path, tensor_names: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the fields of the model section that config.json decides.

    They go by their dotted names ("mla.num_attention_heads"). Fields of compute and memory are not
    among them.

    Args:
      directory: where config.json is.
      tensor_names: those of the checkpoint. An MTP module is there if its tensors are: transformers
        drops them when it saves, and keeps the key.

    Raises:
      UserError: no config.json, an architecture that is not supported, or a key that is not.
    """
    path = directory / "config.json"
    keys = read_json(path)
    reader = ConfigReader(keys, path)
    architecture = ARCHITECTURES[_architecture_name(reader)]
    fields = _shared_fields(reader) | architecture.read(reader, list(tensor_names))
    reader.take("quantization_config", {})
    fp8.block_shape(keys, path)
    reader.check_all_read()
    return fields


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the keys of config.json that decide the model, in the style of transformers 5.

    Args:
      model: the model, with its vocabulary filled in.
      dtype: the type of the tensors in the files, such as "float32".

    Raises:
      UserError: no supported architecture is this model; it names the field.
    """
    name = _architecture_of(model)
    writer = ConfigWriter(model, name)
    plain = model.canon_kernel_size == 0
    writer.require(plain, "canon_kernel_size", "no convolution before attention: 0")
    has_modules = model.num_nextn_predict_layers > 0
    writer.require(not has_modules or model.mtp_input == "normed", "mtp_input", "normed")
    own = ARCHITECTURES[name].write(writer)
    shared = {"hidden_act": "silu", "attention_bias": False, "dtype": dtype}
    named = {"architectures": [name], "model_type": ARCHITECTURES[name].model_type}
    return named | own | writer.keys(SHARED_KEYS) | shared


def _architecture_name(reader: ConfigReader) -> str:
    """Returns the architecture that config.json names; raises UserError for an unknown one."""
    named = reader.take("architectures", [])
    if named:
        name = str(named[0])
    else:
        model_type = reader.take("model_type", "")
        known = {one.model_type: name for name, one in ARCHITECTURES.items()}
        name = known.get(model_type, f"{model_type}ForCausalLM")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f'{reader.path}: architecture "{name}" is not supported (these are: {known})'
        )
    return name


def _architecture_of(model: ModelConfig) -> str:
    """Returns the architecture that may express a model; its `write` says whether it does."""
    attention = {kind.attention for kind in model.kinds}
    if attention == {"mla"}:
        return "DeepseekV32ForCausalLM" if model.indexer.n_heads else "DeepseekV3ForCausalLM"
    if attention == {"gqa"} and model.norm == "scale":
        return "Qwen3MoeForCausalLM" if model.moe_layers else "Qwen3ForCausalLM"
    return "Qwen3NextForCausalLM"


def _shared_fields(reader: ConfigReader) -> dict[str, Any]:
    """Returns the fields that every architecture has."""
    reader.must_be("hidden_act", "silu")
    reader.must_be("attention_bias", False)
    reader.must_be("attention_dropout", 0.0)
    stored = reader.take("dtype", reader.take("torch_dtype", "float32"))
    return reader.take_fields(SHARED_KEYS) | {
        "dtype": "float32" if stored == "float32" else "bfloat16",
        "canon_kernel_size": 0,
    }
