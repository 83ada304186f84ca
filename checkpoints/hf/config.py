"""The model that a config.json describes, and the config.json of a model.

The architecture that config.json names decides how the rest is read. Where a key may be missing,
its default is that of transformers. tests/golden checks what is read here against transformers.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.hf import deepseek, fp8, qwen3
from checkpoints.hf.config_keys import ConfigReader, ConfigWriter, Key, field_of
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

# Keys that state what every architecture here does anyway.
STATED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_rope": True,
}

# What an architecture that is not supported has, and no field of the model section can say.
LACKING = {
    "GlmMoeDsaForCausalLM": (
        "it is a DeepseekV32ForCausalLM but for these: the indexer rotates pairs of channels"
        " (model.rope.indexer_rope_interleave, which no config.json sets yet), and layers may share"
        " the selection of one before them (indexer_types, index_topk_freq; GLM-5.2)"
    ),
}


def model_fields(directory: Path, tensor_names: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the fields of the model section that a directory's config.json decides.

    See `fields_of` for the fields, the names and the errors; UserError too if there is none.
    """
    path = directory / "config.json"
    return fields_of(read_json(path), path, tensor_names)


def fields_of(
    keys: Mapping[str, Any], path: Path, tensor_names: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the fields of the model section that the keys of a config.json decide.

    They go by their dotted names ("mla.num_attention_heads"). Fields of compute and memory are not
    among them.

    Args:
      keys: the keys.
      path: the file, for errors.
      tensor_names: those of the checkpoint. An MTP module is there if its tensors are: transformers
        drops them when it saves, and keeps the key.

    Raises:
      UserError: an architecture that is not supported, or a key that is not.
    """
    reader = ConfigReader(keys, path)
    architecture = ARCHITECTURES[_architecture_name(reader)]
    fields = _shared_fields(reader) | architecture.read(reader, list(tensor_names))
    reader.take("quantization_config", {})
    fp8.block_shape(keys, path)
    reader.check_all_read()
    return fields


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the keys of config.json that decide the model, as transformers 4 and 5 read them.

    Args:
      model: the model, with its vocabulary filled in.
      dtype: the type of the tensors in the files, such as "float32".

    Raises:
      UserError: no supported architecture is this model; it names all fields that say so.
    """
    name, keys, refused = _written(model)
    if refused:
        raise UserError(
            f"{'; '.join(refused)}: {name} cannot express it, so it has no Hugging Face checkpoint"
        )
    # transformers 4 reads the older name only.
    return keys | {"dtype": dtype, "torch_dtype": dtype}


def export_refusals(model: ModelConfig) -> list[str]:
    """Returns the fields of a model that no Hugging Face checkpoint can express.

    Each is a line such as 'model.mla.gate = "element" (must be none)'; none means that the model
    can be exported.
    """
    return _written(model)[2]


def _written(model: ModelConfig) -> tuple[str, dict[str, Any], list[str]]:
    """Returns an architecture, the keys of a model as such a one, and the fields it refuses."""
    name = _architecture_of(model)
    writer = ConfigWriter(model, name)
    writer.require_fields({"canon_kernel_size": 0})
    has_modules = model.num_nextn_predict_layers > 0
    writer.require(not has_modules or model.mtp_input == "normed", "mtp_input", "normed")
    own = ARCHITECTURES[name].write(writer)
    shared = {"hidden_act": "silu", "attention_bias": False}
    named = {"architectures": [name], "model_type": ARCHITECTURES[name].model_type}
    refused = [
        f"model.{field} = {field_of(model, field)!r} (must be {wanted})"
        for field, wanted in writer.refused.items()
    ]
    return name, named | own | writer.keys(SHARED_KEYS) | shared, refused


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
        why = LACKING.get(name, f"these are: {', '.join(ARCHITECTURES)}")
        raise UserError(f'{reader.path}: architecture "{name}" is not supported ({why})')
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
    for name, value in STATED.items():
        reader.must_be(name, value)
    if reader.take("attention_dropout", 0.0, null=0.0) != 0:
        why = "only 0.0 is supported"
        raise reader.unsupported("attention_dropout", reader.keys["attention_dropout"], why)
    stored = reader.take("dtype", reader.take("torch_dtype", "float32"))
    return reader.take_fields(SHARED_KEYS) | {
        "dtype": "float32" if stored == "float32" else "bfloat16",
        "canon_kernel_size": 0,
    }
