"""The fields of configs that have another name than they had: the old ones, and the new.

The record of a run from before is read with its names translated, so that the run still resumes,
samples and evaluates; an old name that a person writes is answered with the new one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# section, by its old name -> {old name of a field or section in it: the new name}
RENAMED = {
    "model": {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "attention_kinds": "layer_types",
        "dense_layers": "first_k_dense_replace",
        "dense_also": "mlp_only_layers",
        "dense_width": "intermediate_size",
        "canon": "canon_kernel_size",
        "mtp_depth": "num_nextn_predict_layers",
        "tie_embeddings": "tie_word_embeddings",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
        "attention": "mla",
    },
    "model.rope": {
        "theta": "rope_theta",
        "stretch": "factor",
        "context": "original_max_position_embeddings",
        "whole_channels": "truncate",
        "scale": "attention_factor",
        "interleaved": "rope_interleave",
        "indexer_interleaved": "indexer_rope_interleave",
    },
    "model.attention": {
        "heads": "num_attention_heads",
        "query_rank": "q_lora_rank",
        "latent_rank": "kv_lora_rank",
        "nope_width": "qk_nope_head_dim",
        "rope_width": "qk_rope_head_dim",
        "value_width": "v_head_dim",
    },
    "model.gqa": {
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "rope_width": "rotary_dim",
    },
    "model.delta": {
        "key_heads": "num_key_heads",
        "value_heads": "num_value_heads",
        "key_width": "key_head_dim",
        "value_width": "value_head_dim",
        "taps": "conv_kernel_dim",
        "chunk": "chunk_size",
    },
    "model.indexer": {"heads": "n_heads", "width": "head_dim", "rope_width": "rope_head_dim"},
    "model.moe": {
        "experts": "num_experts",
        "chosen": "num_experts_per_tok",
        "shared": "n_shared_experts",
        "width": "intermediate_size",
        "shared_width": "shared_expert_intermediate_size",
        "shared_gate": "shared_expert_gate",
        "router": "scoring_func",
        "normalise": "norm_topk_prob",
        "groups": "n_group",
        "chosen_groups": "topk_group",
        "group_best": "group_topk",
        "route_scale": "routed_scaling_factor",
    },
    "tokenizer": {"vocab": "vocab_size"},
    "data": {"sequence": "seq_len", "batch": "batch_size", "template": "chat_template"},
    "sampling": {
        "max_prompt": "max_prompt_tokens",
        "max_new": "max_new_tokens",
        "attention_mass": "attention_top_p",
    },
    "reinforce": {
        "prompts": "prompts_per_step",
        "group": "group_size",
        "answer_reward": "rewards",
        "format_reward": "rewards",
    },
    "train": {"keep": "max_to_keep"},
}
# field that is a mapping -> {old field of the same section: its name in the mapping}
MERGED = {"reinforce.rewards": {"answer_reward": "answer", "format_reward": "format"}}
# field -> {old value: the new value}
RENAMED_VALUES = {"model.expert_matmul": {"by_size": "bucketed"}}
# section -> {field that records from before lack: the value that they were made with, where that is
# not the default}
ADDED = {"train": {"layer_losses": "mean"}}

# section -> fields that there are no more: a flag of a command has taken their place
REMOVED = {"evaluate": frozenset({"perplexity_samples"})}


def new_name(name: str) -> str | None:
    """Returns what the dotted name of a field or section is now; None unless it is renamed.

    A renamed section may have either name, and the name of one of a config's phases may come first,
    as in "pretrain.model.width".
    """
    found = _translate(name)
    phase, _, rest = name.partition(".")
    if found == name and rest:
        found = f"{phase}.{_translate(rest)}"
    return None if found == name else found


def _translate(name: str) -> str:
    old: list[str] = []  # the old names of the sections so far
    new: list[str] = []
    for part in name.split("."):
        names = RENAMED.get(".".join(old), {})
        before = {now: was for was, now in names.items()}
        old.append(before.get(part, part))
        new.append(names.get(part, part))
    return ".".join(new)


def new_name_in(section: Iterable[str], name: str) -> str | None:
    """Returns the dotted new name of the field `name` of a section; None unless it is renamed.

    The section is known by the fields it has now.
    """
    present = set(section)
    for path, names in RENAMED.items():
        if name in names and present.issuperset(names.values()):
            return new_name(f"{path}.{name}")
    return None


def with_new_names(config: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Returns a section of a recorded config with the present names and values.

    It has the fields of `ADDED`, and not those of `REMOVED`.

    Args:
      config: the section; one that has the present names already comes back as it is.
      section: its old dotted name; "" is the whole config.
    """
    names = RENAMED.get(section, {})
    translated: dict[str, Any] = dict(ADDED.get(section, {}))
    for name, value in config.items():
        if name in REMOVED.get(section, ()):
            continue
        path = f"{section}.{name}" if section else name
        if isinstance(value, Mapping):
            value = with_new_names(value, path)
        elif isinstance(value, str):
            value = RENAMED_VALUES.get(path, {}).get(value, value)
        now = names.get(name, name)
        merged = MERGED.get(f"{section}.{now}", {})
        if name in merged:
            value = translated.get(now, {}) | {merged[name]: value}
        translated[now] = value
    return translated
