"""Qwen3, Qwen3-MoE and Qwen3-Next in config.json."""

from collections.abc import Iterable
from typing import Any

from checkpoints.hf.config_keys import REQUIRED, ConfigReader, ConfigWriter, Key, dense_layers
from checkpoints.hf.rope import read_rope, write_rope

ATTENTION_KEYS = (
    Key("gqa.num_attention_heads", "num_attention_heads"),
    Key("gqa.num_key_value_heads", "num_key_value_heads"),
)
DELTA_KEYS = (
    Key("delta.num_key_heads", "linear_num_key_heads"),
    Key("delta.num_value_heads", "linear_num_value_heads"),
    Key("delta.key_head_dim", "linear_key_head_dim"),
    Key("delta.value_head_dim", "linear_value_head_dim"),
    Key("delta.conv_kernel_dim", "linear_conv_kernel_dim"),
)
EXPERT_KEYS = (
    Key("moe.num_experts", "num_experts", REQUIRED, ("num_local_experts",)),
    Key("moe.num_experts_per_tok", "num_experts_per_tok"),
    Key("moe.intermediate_size", "moe_intermediate_size"),
)
# What the architectures fix.
FIXED = {"norm": "scale", "gqa.gate": "none", "gqa.qk_norm": True, "num_nextn_predict_layers": 0}
FIXED_NEXT = {"norm": "zero_centred", "gqa.gate": "element", "gqa.qk_norm": True}
FIXED_MOE = {
    "moe.scoring_func": "softmax",
    "moe.router_bias": False,
    "moe.routed_scaling_factor": 1.0,
}
LAYER_TYPES = {"linear_attention": "delta", "full_attention": "gqa"}


def read_qwen3(reader: ConfigReader, tensor_names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a Qwen3; see `config.model_fields` for the arguments."""
    fields = _read_grouped(reader, reader.take("head_dim", 128))
    return fields | dense_layers([True] * reader.take("num_hidden_layers"))


def read_qwen3_moe(reader: ConfigReader, tensor_names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a Qwen3-MoE; see `config.model_fields` for the arguments."""
    reader.must_be("shared_expert_intermediate_size", 0)
    width = reader.take("hidden_size") // reader.take("num_attention_heads")
    head_dim = reader.take("head_dim", width, null=width)
    return _read_grouped(reader, head_dim) | _read_experts(reader, norm_topk_prob=False)


def read_qwen3_next(reader: ConfigReader, tensor_names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a Qwen3-Next; see `config.model_fields` for the arguments.

    It has Gated DeltaNet and gated attention, zero-centred norms, and a gated shared expert.
    """
    _check_norms(reader)
    reader.must_be("attn_output_gate", True)
    rope_fields, rope = read_rope(reader, partial_rotary_factor=0.25)
    head_dim = reader.take("head_dim", 256)
    modules = reader.take("num_nextn_predict_layers", 1, null=0)
    has_modules = any(name.startswith("mtp.") for name in tensor_names)
    return (
        reader.take_fields((*ATTENTION_KEYS, *DELTA_KEYS))
        | FIXED_NEXT
        | rope_fields
        | _read_experts(reader, norm_topk_prob=True)
        | {
            "layer_types": shortest_period(_read_layer_types(reader)),
            "num_nextn_predict_layers": modules if has_modules else 0,
            "mtp_input": "normed",
            "indexer.n_heads": 0,
            "gqa.head_dim": head_dim,
            "gqa.rotary_dim": int(head_dim * rope["partial_rotary_factor"]),
            "moe.n_shared_experts": 1,
            "moe.shared_expert_intermediate_size": reader.take("shared_expert_intermediate_size"),
            "moe.shared_expert_gate": True,
        }
    )


def write_qwen3(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys that are Qwen3's own; refuses fields that they cannot express."""
    model = writer.model
    writer.require_fields(FIXED)
    whole = model.gqa.rotary_dim == model.gqa.head_dim
    writer.require(whole, "gqa.rotary_dim", "the whole head")
    return writer.keys(ATTENTION_KEYS) | {"head_dim": model.gqa.head_dim} | write_rope(writer)


def write_qwen3_moe(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys that are Qwen3-MoE's own; refuses fields that they cannot express."""
    keys = write_qwen3(writer)
    writer.require_fields({"moe.n_shared_experts": 0})
    return keys | _write_experts(writer)


def write_qwen3_next(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys that are Qwen3-Next's own; refuses fields that they cannot express."""
    model, g, m = writer.model, writer.model.gqa, writer.model.moe
    known = set(model.layer_types) <= set(LAYER_TYPES.values())
    writer.require(known, "layer_types", "delta and gqa")
    writer.require_fields(FIXED_NEXT)
    modules = model.num_nextn_predict_layers
    writer.require(modules <= 1, "num_nextn_predict_layers", "at most 1")
    writer.require(model.moe_layers > 0, "first_k_dense_replace", "some layer with experts")
    shared = m.n_shared_experts == 1 and m.shared_expert_gate
    writer.require(shared, "moe.n_shared_experts", "1, with moe.shared_expert_gate")
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    return (
        writer.keys((*ATTENTION_KEYS, *DELTA_KEYS))
        | write_rope(writer, partial_rotary_factor=g.rotary_dim / g.head_dim)
        | _write_experts(writer)
        | {
            "head_dim": g.head_dim,
            "layer_types": [names.get(kind.attention, "") for kind in model.kinds],
            "shared_expert_intermediate_size": m.shared_intermediate_size,
        }
    )


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the shortest beginning of `kinds` that, repeated, gives all of it."""
    return next(
        kinds[:n]
        for n in range(1, len(kinds) + 1)
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    )


def _read_grouped(reader: ConfigReader, head_dim: int) -> dict[str, Any]:
    """Returns what Qwen3 and Qwen3-MoE share, for heads of this width."""
    _check_norms(reader)
    reader.must_be("use_sliding_window", False)
    reader.must_be("layer_types", ["full_attention"] * reader.take("num_hidden_layers"))
    rope_fields, _ = read_rope(reader)
    heads = reader.take("num_attention_heads")
    key_heads = reader.take("num_key_value_heads", null=heads)
    return (
        FIXED
        | rope_fields
        | {
            "layer_types": ("gqa",),
            "indexer.n_heads": 0,
            "gqa.num_attention_heads": heads,
            "gqa.num_key_value_heads": key_heads,
            "gqa.head_dim": head_dim,
            "gqa.rotary_dim": head_dim,
        }
    )


def _check_norms(reader: ConfigReader) -> None:
    """Raises UserError if a key says that queries and keys have no norm."""
    for name in ("use_qk_norm", "qk_norm", "qk_layernorm"):
        reader.must_be(name, True)


def _read_layer_types(reader: ConfigReader) -> tuple[str, ...]:
    """Returns our names of the kinds of attention of a Qwen3-Next, one a layer."""
    layers, interval = reader.take("num_hidden_layers"), reader.take("full_attention_interval", 4)
    default = [
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(layers)
    ]
    kinds = reader.take("layer_types", default)
    for kind in kinds:
        if kind not in LAYER_TYPES:
            why = f"only {' and '.join(LAYER_TYPES)} are supported"
            raise reader.unsupported("layer_types", kind, why)
    if len(kinds) != layers:
        raise reader.unsupported("layer_types", kinds, f"names {len(kinds)} layers of {layers}")
    return tuple(LAYER_TYPES[kind] for kind in kinds)


def _read_experts(reader: ConfigReader, norm_topk_prob: bool) -> dict[str, Any]:
    """Returns the fields of Qwen's experts: a softmax over all of them, without groups or a bias.

    `norm_topk_prob` is the default of that key.
    """
    without, step = reader.take("mlp_only_layers", []), reader.take("decoder_sparse_step", 1)
    dense = [
        layer in without or (layer + 1) % step != 0
        for layer in range(reader.take("num_hidden_layers"))
    ]
    fields = dense_layers(dense) | reader.take_fields(EXPERT_KEYS) | FIXED_MOE
    return fields | {
        "moe.n_shared_experts": 0,
        "moe.shared_expert_intermediate_size": 0,
        "moe.shared_expert_gate": False,
        "moe.norm_topk_prob": reader.take("norm_topk_prob", norm_topk_prob),
        "moe.n_group": 1,
        "moe.topk_group": 1,
        "moe.group_topk": 0,
    }


def _write_experts(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys of the experts; refuses fields of experts that Qwen3 has not."""
    model = writer.model
    writer.require_fields(FIXED_MOE)
    all_groups = model.moe.topk_group == model.moe.n_group
    writer.require(all_groups, "moe.topk_group", "all of model.moe.n_group")
    return writer.keys(EXPERT_KEYS) | {
        "norm_topk_prob": model.moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(model.kinds) if not kind.moe],
    }
