"""Where a model comes from: the workdir of a run, or `hf:DIR`, a Hugging Face checkpoint as it is.
Of the latter, config.json decides the model section.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def with_hf_fields(config: ConfigDict, directory: Path) -> ConfigDict:
    """The config with what a Hugging Face checkpoint decides: the model but for how it is computed,
    its tokenizer, its chat template if it has one, and whether sampling selects keys. Raises
    UserError for a checkpoint that is not supported.
    """
    from checkpoints.hf.architecture import model_fields, read_json
    from checkpoints.hf.safetensors import TensorFiles
    from data.chat_template import find_chat_template

    config = with_model(config, model_fields(directory, TensorFiles(directory).tensors))
    if (directory / "tokenizer.json").exists():
        config.tokenizer.kind, config.tokenizer.path = "file", str(directory)
        beside = directory / "tokenizer_config.json"
        if (
            find_chat_template(directory, read_json(beside) if beside.exists() else {}, {})
            is not None
        ):
            config.data.chat_template = "checkpoint"
    return config


def with_model(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy with these fields of the model section, by dotted name; sampling selects keys if the
    model has an indexer.
    """
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        *sections, field = name.split(".")
        section = config.model
        for part in sections:
            section = section[part]
        section[field] = value
    config.sampling.attention = "sparse" if config.model.indexer.n_heads else "dense"
    return config


# Fields of the model section that say how it is computed or trained, and nothing of what it is.
FREE = (
    "initializer_range",
    "dtype",
    "remat",
    "scan_unroll",
    "attention_form",
    "query_chunk",
    "causal_parts",
    "logit_chunk",
    "expert_matmul",
)


def with_recorded_model(config: ConfigDict, recorded: ConfigDict) -> ConfigDict:
    """The config with the model, the template and the attention of a run that comes from a Hugging
    Face checkpoint.
    """
    config = config.copy_and_resolve_references()
    free = {name: config.model[name] for name in FREE if name != "dtype"}
    config.model = recorded.model
    config.model.update(free)
    config.data.chat_template, config.sampling.attention = (
        recorded.data.chat_template,
        recorded.sampling.attention,
    )
    return config
