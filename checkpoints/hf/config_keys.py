"""Keys of a config.json and the fields of our model section that they are.

The same tables read them and write them. A key that is not read must be one that changes no result
of the model, or be off.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from errors import UserError
from model.config import ModelConfig

# These keys change no result of the model: they are about training, sampling, serving or the files,
# or follow from others.
WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures", "auto_map",
    "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "ep_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_position_embeddings",
    "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "qk_head_dim", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id", "seq_aux", "sliding_window",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache",
})  # fmt: skip

REQUIRED = object()  # in place of a default: the key must be there
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Key(NamedTuple):
    """A key of config.json that is a field of the model section.

    Attributes:
      field: the field, by its dotted name within the section, such as "mla.kv_lora_rank".
      name: the key.
      default: its value where it is missing, which is that of transformers; REQUIRED: a positive
        whole number must be there.
      other_names: keys that mean the same and are read, and never written.
    """

    field: str
    name: str
    default: Any = REQUIRED
    other_names: tuple[str, ...] = ()


class ConfigReader:
    """Reads the keys of a config.json, and knows in the end which were not read.

    Args:
      keys: the JSON object.
      path: the file, for errors.
    """

    def __init__(self, keys: Mapping[str, Any], path: object):
        self.keys, self.path = keys, path
        self._read: set[str] = set()

    def take(self, name: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """Returns the value of a key, or the default where the key is missing.

        The value has the type of the default. Null is what it is in transformers: `null` where that
        is given, else false of a flag, no number, and the default of all else.

        Raises:
          UserError: the value is of another type; or the key has no default, and is missing or not
            a positive whole number.
        """
        self._read.add(name)
        if name not in self.keys and default is not REQUIRED:
            return default
        value = self.keys.get(name)
        if value is None:
            return self._of_null(name, default, null)
        wanted = int if default is REQUIRED else type(default)
        if wanted is int and type(value) is float and value.is_integer():
            value = int(value)
        numbers = (int, float) if wanted is float else wanted
        if not isinstance(value, numbers) or isinstance(value, bool) != (wanted is bool):
            raise self.unsupported(name, value, f"must be {TYPE_NAMES[wanted]}")
        if default is REQUIRED and value <= 0:
            raise self.unsupported(name, value, "must be positive")
        return float(value) if wanted is float else value

    def take_first(self, names: Iterable[str]) -> Any:
        """Returns the value of the first of these keys that is there.

        Raises:
          UserError: none is there, or two of them differ: they mean the same.
        """
        names = list(names)
        first, *others = [name for name in names if self.keys.get(name) is not None] or names[:1]
        value = self.take(first)
        for name in others:
            if self.take(name) != value:
                why = f'means the same as "{first}", which is {value}'
                raise self.unsupported(name, self.keys[name], why)
        return value

    def take_fields(self, table: Iterable[Key]) -> dict[str, Any]:
        """Returns the fields of a table of keys. Raises UserError as `take` does."""
        return {
            key.field: self.take_first((key.name, *key.other_names))
            if key.default is REQUIRED
            else self.take(key.name, key.default)
            for key in table
        }

    def must_be(self, name: str, allowed: Any) -> None:
        """Raises UserError if a key has another value than the one that is supported.

        That one is also its default.
        """
        value = self.take(name, allowed)
        if value != allowed:
            raise self.unsupported(name, value, f"only {json.dumps(allowed)} is supported")

    def ignore(self, *names: str) -> None:
        """Counts keys as read."""
        self._read.update(names)

    def _of_null(self, name: str, default: Any, null: Any) -> Any:
        """Returns what null means as the value of a key; see `take`."""
        if null is not REQUIRED and name in self.keys:
            return null
        if default is REQUIRED:
            raise UserError(f'{self.path}: no key "{name}"')
        if type(default) in (int, float):
            raise self.unsupported(name, None, f"must be {TYPE_NAMES[type(default)]}")
        return False if isinstance(default, bool) else default

    def unsupported(self, name: str, value: Any, why: str) -> UserError:
        """Returns the error for a value of a key."""
        return UserError(f'{self.path}: "{name}": {json.dumps(value)}: {why}')

    def check_all_read(self) -> None:
        """Raises UserError if a key was not read, is not off, and may change the results."""
        for name, value in self.keys.items():
            off = value is None or value is False or value in (0, [], {}, "")
            if name not in self._read and name not in WITHOUT_EFFECT and not off:
                why = "unknown here, and it may change what the model computes"
                raise self.unsupported(name, value, why)


class ConfigWriter:
    """Writes a model as keys of a config.json, and collects why an architecture cannot express it.

    Args:
      model: the model.
      architecture: its name in config.json, such as "Qwen3ForCausalLM".

    Attributes:
      refused: the fields that the architecture cannot express, each with what it must be.
    """

    def __init__(self, model: ModelConfig, architecture: str):
        self.model, self.architecture = model, architecture
        self.refused: dict[str, str] = {}

    def keys(self, table: Iterable[Key]) -> dict[str, Any]:
        """Returns the keys of a table."""
        return {key.name: field_of(self.model, key.field) for key in table}

    def require(self, expressible: bool, field: str, wanted: str) -> bool:
        """Refuses a field, which must be as `wanted` says, unless `expressible`; returns that."""
        if not expressible:
            self.refused.setdefault(field, wanted)
        return expressible

    def require_fields(self, fixed: Mapping[str, Any]) -> None:
        """Refuses each field that has not the value that the architecture fixes."""
        for field, value in fixed.items():
            self.require(field_of(self.model, field) == value, field, str(value))


def field_of(model: ModelConfig, field: str) -> Any:
    """Returns a field of the model section by its dotted name, such as "mla.kv_lora_rank"."""
    value: Any = model
    for name in field.split("."):
        value = getattr(value, name)
    return value


def with_fields(model: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """Returns a model with other values of fields, which go by their dotted names.

    Raises UserError if they do not go together.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    changed = {
        name: dataclasses.replace(getattr(model, name), **values)
        for name, values in sections.items()
        if name
    }
    return dataclasses.replace(model, **changed, **sections.get("", {}))


def dense_layers(dense: list[bool]) -> dict[str, Any]:
    """Returns the fields that say which layers have no experts.

    They are how many from the first on have none, and the numbers of the others.
    """
    first = dense.index(False) if False in dense else len(dense)
    others = tuple(layer for layer, is_dense in enumerate(dense) if is_dense and layer > first)
    return {"first_k_dense_replace": first, "mlp_only_layers": others}
