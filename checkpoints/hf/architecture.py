"""What a Hugging Face config.json says, as fields of our model section.

The architecture named there decides how the rest is read; a key that is not read must be one that
changes no result, or be off. Both styles are read: that of the released files (`rope_scaling`,
`rope_theta` beside it) and that of transformers 5 (`rope_parameters`). Where a key may be missing,
its default is transformers'. What is read here is checked against transformers in tests/golden.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from errors import UserError

MISSING = object()

# Keys that change no result of the model: they are about training, sampling, serving, the files, or
# are derived from others.
WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures", "auto_map", "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "ep_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "max_position_embeddings", "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "qk_head_dim", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
    "sep_token_id", "seq_aux", "sliding_window", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
})  # fmt: skip


TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Keys:
    """The keys of a config.json, each to be read once, or found left over."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where, self.read = values, where, set()

    def take(self, name: str, default: Any = MISSING) -> Any:
        """Its value, of the default's type; the default where it is missing or null. Without a
        default it must be there, and a positive whole number.
        """
        self.read.add(name)
        value = self.values.get(name)
        if value is None and default is MISSING:
            raise UserError(f'{self.where}: no key "{name}"')
        if value is None:
            return default
        wanted = int if default is MISSING else type(default)
        if wanted is int and type(value) is float and value.is_integer():
            value = int(value)
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(
            value, bool
        ) != (wanted is bool):
            raise self.unsupported(name, value, f"must be {TYPE_NAMES[wanted]}")
        if default is MISSING and value <= 0:
            raise self.unsupported(name, value, "must be positive")
        return value

    def first_of(self, *names: str) -> Any:
        """The value of the first of these names that is there: they mean the same, and may not
        differ.
        """
        there = [name for name in names if self.values.get(name) is not None] or [names[0]]
        for name in there[1:]:
            if self.take(name) != self.take(there[0]):
                raise self.unsupported(
                    name,
                    self.values[name],
                    f'means the same as "{there[0]}", which is {self.values[there[0]]}',
                )
        return self.take(there[0])

    def must_be(self, name: str, allowed: Iterable[Any], default: Any) -> None:
        """For a key of which only some values are supported."""
        value, allowed = self.take(name, default), list(allowed)
        if value not in allowed:
            raise self.unsupported(
                name, value, f"only {' or '.join(json.dumps(one) for one in allowed)} is supported"
            )

    def unsupported(self, name: str, value: Any, why: str) -> UserError:
        return UserError(f'{self.where}: "{name}": {json.dumps(value)}: {why}')

    def nothing_left(self) -> None:
        """Raises UserError on a key that nobody read, may change the model's results, and is not
        off.
        """
        for name, value in self.values.items():
            off = value is None or value is False or value in (0, [], {}, "")
            if name not in self.read and name not in WITHOUT_EFFECT and not off:
                raise self.unsupported(
                    name, value, "unknown here, and it may change what the model computes"
                )


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def model_fields(directory: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """Fields of the model section, by dotted name ("mla.num_attention_heads"), that config.json
    decides; compute and memory settings are not among them.

    Args:
      names: of the checkpoint's tensors: an MTP module is there if its tensors are (transformers
        drops them when it saves, and keeps the key).

    Raises:
      UserError: no config.json, an architecture that is not supported, or a key of it that is not.
    """
    keys = Keys(read_json(directory / "config.json"), str(directory / "config.json"))
    architecture = named_architecture(keys)
    fields = shared_fields(keys) | ARCHITECTURES[architecture](keys, list(names))
    keys.take("quantization_config", {})  # checkpoints/hf/load.py reads it: it is about the files
    keys.nothing_left()
    return fields


def named_architecture(keys: Keys) -> str:
    named = keys.take("architectures", [])
    if not named:
        of_type = {
            "deepseek_v3": "DeepseekV3",
            "deepseek_v32": "DeepseekV32",
            "qwen3": "Qwen3",
            "qwen3_moe": "Qwen3Moe",
            "qwen3_next": "Qwen3Next",
        }
        kind = keys.take("model_type", "")
        named = [of_type.get(kind, kind) + "ForCausalLM"]
    if str(named[0]) not in ARCHITECTURES:
        raise UserError(
            f'{keys.where}: architecture "{named[0]}" is not supported (these are: {", ".join(ARCHITECTURES)})'
        )
    return named[0]


def shared_fields(keys: Keys) -> dict[str, Any]:
    """What every family has."""
    keys.must_be("hidden_act", ["silu"], "silu")
    keys.must_be("attention_bias", [False], False)
    keys.must_be("attention_dropout", [0], 0.0)
    stored = keys.take("dtype", keys.take("torch_dtype", "float32"))
    return {
        "vocab_size": keys.take("vocab_size"),
        "hidden_size": keys.take("hidden_size"),
        "num_hidden_layers": keys.take("num_hidden_layers"),
        "intermediate_size": keys.take("intermediate_size"),
        "tie_word_embeddings": keys.take("tie_word_embeddings", False),
        "rms_norm_eps": float(keys.take("rms_norm_eps", 1e-6)),
        "dtype": "float32" if stored == "float32" else "bfloat16",
        "canon_kernel_size": 0,
    }


def rope_fields(keys: Keys, partial: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's rope fields, and the rope keys themselves. `partial`: the share of a head that is
    rotated where no key says so; 1: it must be all.
    """
    new, old = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    rope = dict(old or new)  # transformers prefers the old, should both be there
    keys.read |= {"rope_theta", "original_max_position_embeddings"}
    rope["partial_rotary_factor"] = rope.get("partial_rotary_factor") or keys.take(
        "partial_rotary_factor", partial
    )
    if partial == 1 and rope["partial_rotary_factor"] != 1:
        raise keys.unsupported(
            "partial_rotary_factor",
            rope["partial_rotary_factor"],
            "only 1 is supported in this architecture",
        )
    if any(isinstance(value, dict) for value in rope.values()):
        raise keys.unsupported(
            "rope_parameters", rope, "positions that differ from layer to layer are not supported"
        )
    for name, value in rope.items():
        if name not in ("rope_type", "type") and not isinstance(value, int | float | None):
            raise keys.unsupported(name, value, "must be a number")
    rope["rope_theta"] = float(rope.get("rope_theta") or keys.take("rope_theta", 10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise keys.unsupported("rope_type", kind, 'only "default" and "yarn" are supported')
    fields = {
        "rope.rope_theta": rope["rope_theta"],
        "rope.factor": 1.0,
        "rope.attention_factor": 1.0,
    }
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind == "yarn":
        known |= {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        }
        before = keys.take(
            "original_max_position_embeddings",
            rope.get("original_max_position_embeddings") or keys.take("max_position_embeddings"),
        )
        stretch = float(rope.get("factor") or keys.take("max_position_embeddings") / before)
        scale = rope.get("attention_factor")
        if scale is None:
            both = rope.get("mscale") and rope.get("mscale_all_dim")
            scale = (
                magnitude(stretch, rope["mscale"]) / magnitude(stretch, rope["mscale_all_dim"])
                if both
                else magnitude(stretch, 1.0)
            )
        fields |= {
            "rope.factor": stretch,
            "rope.original_max_position_embeddings": int(before),
            "rope.beta_fast": float(rope.get("beta_fast") or 32),
            "rope.beta_slow": float(rope.get("beta_slow") or 1),
            "rope.truncate": bool(rope.get("truncate", True)),
            "rope.attention_factor": float(scale),
        }
    for name in rope.keys() - known:
        raise keys.unsupported(name, rope[name], f"not a key of rope_type {kind} that is supported")
    return fields, rope


def magnitude(stretch: float, mscale: float) -> float:
    """0.1 mscale ln(stretch) + 1: the square root of YaRN's 1 / t (arXiv 2309.00071, eq. 22) where
    mscale is 1.
    """
    return 0.1 * mscale * math.log(stretch) + 1.0 if stretch > 1 else 1.0


def latent(keys: Keys, names: list[str], indexed: bool) -> dict[str, Any]:
    """DeepSeek-V3 and its kin (R1, Kimi-K2, Moonlight); with `indexed` V3.2."""
    keys.must_be("scoring_func", ["sigmoid"], "sigmoid")
    keys.must_be("topk_method", ["noaux_tc"], "noaux_tc")
    keys.must_be("moe_layer_freq", [1], 1)
    keys.must_be("mlp_bias", [False], False)
    heads, layers = keys.take("num_attention_heads"), keys.take("num_hidden_layers")
    keys.must_be("num_key_value_heads", [heads], heads)
    fields, rope = rope_fields(keys)
    if fields["rope.factor"] > 1 and rope.get("mscale_all_dim"):
        fields["mla.logit_scale"] = magnitude(fields["rope.factor"], rope["mscale_all_dim"]) ** 2
    dense = keys.take("first_k_dense_replace", 0)
    kinds = keys.take(
        "mlp_layer_types", ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense)
    )
    if len(kinds) != layers:
        raise keys.unsupported("mlp_layer_types", kinds, f"names {len(kinds)} layers of {layers}")
    groups, modules = (
        keys.take("n_group", 1),
        keys.take("num_nextn_predict_layers", keys.take("num_mtp_layers", 0)),
    )
    fields |= {
        "layer_types": ("mla",),
        "num_nextn_predict_layers": modules
        if any(name.startswith(f"model.layers.{layers}.") for name in names)
        else 0,
        "mtp_input": "normed",
        "norm": "scale",
        "rope.rope_interleave": keys.take("rope_interleave", True),
        "rope.indexer_rope_interleave": False,
        "mla.num_attention_heads": heads,
        "mla.q_lora_rank": keys.take("q_lora_rank", 0),
        "mla.kv_lora_rank": keys.take("kv_lora_rank"),
        "mla.qk_nope_head_dim": keys.take("qk_nope_head_dim"),
        "mla.qk_rope_head_dim": keys.take("qk_rope_head_dim"),
        "mla.v_head_dim": keys.take("v_head_dim"),
        "mla.logit_scale": fields.get("mla.logit_scale", 1.0),
        "mla.norm_eps": 1e-6,  # whatever rms_norm_eps is, in every implementation
        "mla.gate": "none",
        "indexer.n_heads": 0,
        "moe.num_experts": keys.first_of("n_routed_experts", "num_local_experts", "num_experts"),
        "moe.num_experts_per_tok": keys.take("num_experts_per_tok"),
        "moe.n_shared_experts": keys.take("n_shared_experts", 0),
        "moe.intermediate_size": keys.take("moe_intermediate_size"),
        "moe.shared_expert_intermediate_size": 0,
        "moe.shared_expert_gate": False,
        "moe.scoring_func": "sigmoid",
        "moe.router_bias": True,
        "moe.norm_topk_prob": keys.take("norm_topk_prob", True),
        "moe.n_group": groups,
        "moe.topk_group": keys.take("topk_group", groups),
        "moe.group_topk": 2,
        "moe.routed_scaling_factor": float(keys.take("routed_scaling_factor", 1.0)),
    }
    fields |= dense_fields([kind != "sparse" for kind in kinds])
    keys.read.add("head_dim")  # transformers 5 writes the rotated width there
    if indexed:
        keys.must_be("rope_interleave", [True], True)
        keys.must_be("indexer_rope_interleave", [False], False)
        keys.must_be(
            "layer_types", [["indexed_attention"] * layers], ["indexed_attention"] * layers
        )
        if fields["mla.q_lora_rank"] == 0:
            raise keys.unsupported(
                "q_lora_rank", None, "the indexer reads the query latent, and there is none"
            )
        fields |= {
            "indexer.n_heads": keys.take("index_n_heads"),
            "indexer.head_dim": keys.take("index_head_dim"),
            "indexer.rope_head_dim": fields["mla.qk_rope_head_dim"],
            "indexer.topk": keys.take("index_topk"),
            "indexer.norm_eps": 1e-6,
        }
    return fields


def grouped(keys: Keys, names: list[str], experts: bool) -> dict[str, Any]:
    """Qwen3, with `experts` Qwen3-MoE."""
    keys.must_be("use_sliding_window", [False], False)
    layers, heads = keys.take("num_hidden_layers"), keys.take("num_attention_heads")
    keys.must_be("layer_types", [["full_attention"] * layers], ["full_attention"] * layers)
    fields, _ = rope_fields(keys)
    width = keys.take("head_dim", keys.take("hidden_size") // heads if experts else 128)
    fields |= {
        "layer_types": ("gqa",),
        "num_nextn_predict_layers": 0,
        "norm": "scale",
        "indexer.n_heads": 0,
        "gqa.num_attention_heads": heads,
        "gqa.num_key_value_heads": keys.take("num_key_value_heads", heads)
        if "num_key_value_heads" in keys.values
        else keys.take("num_key_value_heads"),
        "gqa.head_dim": width,
        "gqa.rotary_dim": width,
        "gqa.qk_norm": True,
        "gqa.gate": "none",
    }
    return fields | (
        routed_fields(keys, normalise=False) if experts else dense_fields([True] * layers)
    )


def hybrid(keys: Keys, names: list[str]) -> dict[str, Any]:
    """Qwen3-Next: Gated DeltaNet layers and gated attention, zero-centred norms, a gated shared
    expert.
    """
    layers = keys.take("num_hidden_layers")
    every = keys.take("full_attention_interval", 4)
    default = [
        "linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
    ]
    ours = {"linear_attention": "delta", "full_attention": "gqa"}
    kinds = keys.take("layer_types", default)
    for kind in kinds:
        if kind not in ours:
            raise keys.unsupported("layer_types", kind, f"only {' and '.join(ours)} are supported")
    if len(kinds) != layers:
        raise keys.unsupported("layer_types", kinds, f"names {len(kinds)} layers of {layers}")
    fields, rope = rope_fields(keys, partial=0.25)
    width, modules = keys.take("head_dim", 256), keys.take("num_nextn_predict_layers", 1)
    fields |= {
        "layer_types": shortest_period(tuple(ours[kind] for kind in kinds)),
        "num_nextn_predict_layers": modules
        if any(name.startswith("mtp.") for name in names)
        else 0,
        "mtp_input": "normed",
        "norm": "zero_centred",
        "indexer.n_heads": 0,
        "gqa.num_attention_heads": keys.take("num_attention_heads"),
        "gqa.num_key_value_heads": keys.take("num_key_value_heads"),
        "gqa.head_dim": width,
        "gqa.rotary_dim": int(width * rope["partial_rotary_factor"]),
        "gqa.qk_norm": True,
        "gqa.gate": "element",
        "delta.num_key_heads": keys.take("linear_num_key_heads"),
        "delta.num_value_heads": keys.take("linear_num_value_heads"),
        "delta.key_head_dim": keys.take("linear_key_head_dim"),
        "delta.value_head_dim": keys.take("linear_value_head_dim"),
        "delta.conv_kernel_dim": keys.take("linear_conv_kernel_dim"),
    }
    shared = {
        "moe.n_shared_experts": 1,
        "moe.shared_expert_intermediate_size": keys.take("shared_expert_intermediate_size"),
        "moe.shared_expert_gate": True,
    }
    return fields | routed_fields(keys, normalise=True) | shared


def routed_fields(keys: Keys, normalise: bool) -> dict[str, Any]:
    """Qwen's experts: softmax over all of them, no groups, no bias. `normalise`: what
    norm_topk_prob is where it is missing.
    """
    layers = keys.take("num_hidden_layers")
    without, step = keys.take("mlp_only_layers", []), keys.take("decoder_sparse_step", 1)
    return dense_fields(
        [layer in without or (layer + 1) % step != 0 for layer in range(layers)]
    ) | {
        "moe.num_experts": keys.first_of("num_experts", "num_local_experts"),
        "moe.num_experts_per_tok": keys.take("num_experts_per_tok"),
        "moe.n_shared_experts": 0,
        "moe.intermediate_size": keys.take("moe_intermediate_size"),
        "moe.shared_expert_intermediate_size": 0,
        "moe.shared_expert_gate": False,
        "moe.scoring_func": "softmax",
        "moe.router_bias": False,
        "moe.norm_topk_prob": keys.take("norm_topk_prob", normalise),
        "moe.n_group": 1,
        "moe.topk_group": 1,
        "moe.group_topk": 0,
        "moe.routed_scaling_factor": 1.0,
    }


def dense_fields(dense: list[bool]) -> dict[str, Any]:
    """Which layers have no experts, as how many from the first on and which others."""
    first = dense.index(False) if False in dense else len(dense)
    return {
        "first_k_dense_replace": first,
        "mlp_only_layers": tuple(
            layer for layer, is_dense in enumerate(dense) if is_dense and layer > first
        ),
    }


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest beginning that, repeated, gives all of it."""
    return next(
        kinds[:n]
        for n in range(1, len(kinds) + 1)
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    )


ARCHITECTURES: dict[str, Callable[[Keys, list[str]], dict[str, Any]]] = {
    "DeepseekV3ForCausalLM": lambda keys, names: latent(keys, names, indexed=False),
    "DeepseekV32ForCausalLM": lambda keys, names: latent(keys, names, indexed=True),
    "Qwen3ForCausalLM": lambda keys, names: grouped(keys, names, experts=False),
    "Qwen3MoeForCausalLM": lambda keys, names: grouped(keys, names, experts=True),
    "Qwen3NextForCausalLM": hybrid,
}
