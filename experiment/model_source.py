"""The part of a config that a checkpoint decides.

The config.json of `hf:DIR` decides the model section, the tokenizer and the chat template; so does
the record of a run that comes from such a checkpoint. The record of any other run fills in what a
config does not say of its model.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from files import read_json

# Fields of the model section that say how it is computed or trained, and nothing of what it is. Its
# dtype is the checkpoint's.
COMPUTATION = (
    "initializer_range",
    "remat",
    "scan_unroll",
    "attention_form",
    "query_chunk",
    "causal_parts",
    "logit_chunk",
    "expert_matmul",
)


def with_hf_fields(config: ConfigDict, directory: Path) -> ConfigDict:
    """Returns the config with what a Hugging Face checkpoint decides.

    That is the model but for how it is computed, its tokenizer, its chat template, and whether
    sampling selects keys. Where it has no template, "think" is not taken in its place: no model but
    ours is trained on that. Raises UserError for a checkpoint that is not supported.
    """
    from checkpoints.hf.config import model_fields
    from checkpoints.hf.safetensors import TensorFiles
    from data.chat_template import find_chat_template
    from data.tokenizer_files import has_tokenizer

    config = with_model(config, model_fields(directory, TensorFiles(directory).tensors))
    if has_tokenizer(directory):
        config.tokenizer.kind, config.tokenizer.path = "file", str(directory)
        settings = directory / "tokenizer_config.json"
        tokenizer_config = read_json(settings) if settings.exists() else {}
        own = find_chat_template(directory, tokenizer_config, {})
        if own is not None or config.data.chat_template == "think":
            config.data.chat_template = "checkpoint"
    return config


def with_model(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Returns a copy with these fields of the model section, by dotted name.

    Sampling selects keys if the model has an indexer.
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


def with_recorded_model(config: ConfigDict, recorded: ConfigDict) -> ConfigDict:
    """Returns the config with model, chat template and attention of a recorded run.

    The run is one that comes from a Hugging Face checkpoint.
    """
    config = config.copy_and_resolve_references()
    computation = {name: config.model[name] for name in COMPUTATION}
    config.model = recorded.model
    config.model.update(computation)
    config.data.chat_template = recorded.data.chat_template
    if not config.data.chat_template_options:
        config.data.chat_template_options = recorded.data.chat_template_options
    config.sampling.attention = recorded.sampling.attention
    return config


def with_model_of_run(config: Any, recorded: Any, default: Any) -> Any:
    """Returns the config with what it does not say of its model as a recorded run has it.

    A field of the model section, of the chat template or of the attention in sampling is not said
    where it has its default. So a config file may still change the model, as to stretch its
    positions, by any other value.
    """
    config = config.copy_and_resolve_references()

    def fill(section: Any, of_run: Any, usual: Any) -> None:
        if not isinstance(section, ConfigDict):
            return  # a mistake, which validation answers
        for name, value in usual.items():
            if isinstance(value, ConfigDict):
                fill(section.get(name), of_run[name], value)
            elif section.get(name) == value:
                section[name] = of_run[name]

    fill(config.get("model"), recorded.model, default.model)
    for section, names in (
        ("data", ("chat_template", "chat_template_options")),
        ("sampling", ("attention",)),
    ):
        usual = ConfigDict({name: default[section][name] for name in names})
        fill(config.get(section), recorded[section], usual)
    return config
