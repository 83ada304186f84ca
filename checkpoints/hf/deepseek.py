"""DeepSeek-V3 and its kin (R1, Kimi-K2, Moonlight), and V3.2, in config.json."""

import math
from collections.abc import Iterable
from typing import Any

from checkpoints.hf.config_keys import REQUIRED, ConfigReader, ConfigWriter, Key, dense_layers
from checkpoints.hf.rope import magnitude, mscale_of, read_rope, write_rope

KEYS = (
    Key("mla.num_attention_heads", "num_attention_heads"),
    Key("mla.kv_lora_rank", "kv_lora_rank"),
    Key("mla.qk_nope_head_dim", "qk_nope_head_dim"),
    Key("mla.qk_rope_head_dim", "qk_rope_head_dim"),
    Key("mla.v_head_dim", "v_head_dim"),
    Key("moe.num_experts", "n_routed_experts", REQUIRED, ("num_local_experts", "num_experts")),
    Key("moe.num_experts_per_tok", "num_experts_per_tok"),
    Key("moe.n_shared_experts", "n_shared_experts", 1),
    Key("moe.intermediate_size", "moe_intermediate_size"),
    Key("moe.norm_topk_prob", "norm_topk_prob", True),
    Key("moe.n_group", "n_group", 8),
    Key("moe.topk_group", "topk_group", 4),
    Key("moe.routed_scaling_factor", "routed_scaling_factor", 2.5),
)
INDEXER_KEYS = (
    Key("indexer.n_heads", "index_n_heads"),
    Key("indexer.head_dim", "index_head_dim"),
    Key("indexer.topk", "index_topk"),
)
# What the architecture fixes. The latents' norms have this epsilon whatever rms_norm_eps is, in
# every implementation.
FIXED = {"norm": "scale", "mla.gate": "none", "mla.norm_eps": 1e-6}
FIXED_MOE = {
    "moe.scoring_func": "sigmoid",
    "moe.router_bias": True,
    "moe.shared_expert_gate": False,
}


def read_v3(reader: ConfigReader, tensor_names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a DeepSeek-V3; see `config.model_fields` for the arguments."""
    reader.must_be("scoring_func", "sigmoid")
    reader.must_be("topk_method", "noaux_tc")
    reader.must_be("moe_layer_freq", 1)
    heads = reader.take("num_attention_heads")
    if reader.take("num_key_value_heads", heads, null=heads) != heads:
        why = f"only num_attention_heads, {heads}, is supported"
        raise reader.unsupported("num_key_value_heads", reader.keys["num_key_value_heads"], why)
    reader.ignore("head_dim")  # transformers 5 writes the rotated width there
    rope_fields, rope = read_rope(reader)
    fields = reader.take_fields(KEYS) | FIXED | FIXED_MOE | rope_fields
    factor, logit_scale = fields["rope.factor"], 1.0
    if factor > 1 and rope.get("mscale_all_dim"):
        logit_scale = magnitude(factor, rope["mscale_all_dim"]) ** 2
    return (
        fields
        | _dense_layers(reader)
        | {
            "layer_types": ("mla",),
            "num_nextn_predict_layers": _mtp_modules(reader, tensor_names),
            "mtp_input": "normed",
            "rope.rope_interleave": reader.take("rope_interleave", True),
            "rope.indexer_rope_interleave": False,
            # null: queries have no latent
            "mla.q_lora_rank": reader.take("q_lora_rank", 1536, null=0),
            "mla.logit_scale": logit_scale,
            "indexer.n_heads": 0,
            "moe.shared_expert_intermediate_size": 0,
            "moe.group_topk": 2,
        }
    )


def read_v32(reader: ConfigReader, tensor_names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a DeepSeek-V3.2: a V3 with an indexer in every layer."""
    fields = read_v3(reader, tensor_names)
    reader.must_be("rope_interleave", True)
    reader.must_be("indexer_rope_interleave", False)
    reader.must_be("layer_types", ["indexed_attention"] * reader.take("num_hidden_layers"))
    if fields["mla.q_lora_rank"] == 0:
        why = "the indexer reads the query latent, and there is none"
        raise reader.unsupported("q_lora_rank", None, why)
    indexer = reader.take_fields(INDEXER_KEYS)
    rotated = {"indexer.rope_head_dim": fields["mla.qk_rope_head_dim"], "indexer.norm_eps": 1e-6}
    return fields | indexer | rotated


def write_v3(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys that are DeepSeek-V3's own; refuses fields that they cannot express."""
    return _write(writer) | {"rope_interleave": writer.model.rope.rope_interleave}


def write_v32(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys that are DeepSeek-V3.2's own; refuses fields that they cannot express."""
    keys = _write(writer)
    a, i = writer.model.mla, writer.model.indexer
    writer.require(a.q_lora_rank > 0, "mla.q_lora_rank", "above 0: the indexer reads the latent")
    writer.require_fields({"rope.rope_interleave": True, "rope.indexer_rope_interleave": False})
    writer.require(
        i.rope_head_dim == a.qk_rope_head_dim,
        "indexer.rope_head_dim",
        f"that of attention, {a.qk_rope_head_dim}",
    )
    writer.require_fields({"indexer.norm_eps": 1e-6})
    return keys | writer.keys(INDEXER_KEYS)


def _write(writer: ConfigWriter) -> dict[str, Any]:
    """Returns the keys of config.json; refuses fields that they cannot express."""
    model, a = writer.model, writer.model.mla
    writer.require_fields(FIXED)
    writer.require(not model.mlp_only_layers, "mlp_only_layers", "(): only the first are dense")
    writer.require(
        model.num_nextn_predict_layers == 0 or not model.tie_word_embeddings,
        "tie_word_embeddings",
        "False with an MTP module",
    )
    if model.moe_layers or model.mtp_kind.moe:
        _require_experts(writer)
    return (
        writer.keys(KEYS)
        | write_rope(writer, **_mscales(writer))
        | {
            "num_key_value_heads": a.num_attention_heads,
            "q_lora_rank": a.q_lora_rank or None,
            "first_k_dense_replace": model.first_k_dense_replace,
            "num_nextn_predict_layers": model.num_nextn_predict_layers,
        }
    )


def _mscales(writer: ConfigWriter) -> dict[str, float]:
    """Returns YaRN's keys by which DeepSeek scales the logits.

    mscale says the same as attention_factor, to readers that do not know that key.
    """
    rope, logit_scale = writer.model.rope, writer.model.mla.logit_scale
    if rope.factor == 1:
        writer.require(logit_scale == 1, "mla.logit_scale", "1 without rope.factor")
        return {}
    if not writer.require(logit_scale >= 1, "mla.logit_scale", "at least 1"):
        return {}
    root = math.sqrt(logit_scale)
    return {
        "mscale": mscale_of(rope.factor, rope.attention_factor * root),
        "mscale_all_dim": mscale_of(rope.factor, root),
    }


def _require_experts(writer: ConfigWriter) -> None:
    """Refuses fields of experts that DeepSeek-V3 has not."""
    m = writer.model.moe
    writer.require_fields(FIXED_MOE)
    writer.require(
        m.shared_expert_intermediate_size in (0, m.intermediate_size),
        "moe.shared_expert_intermediate_size",
        "that of the other experts",
    )
    best = m.group_topk or max(1, m.num_experts_per_tok // m.topk_group)
    writer.require(best == 2 or m.topk_group == m.n_group, "moe.group_topk", "2")


def _dense_layers(reader: ConfigReader) -> dict[str, Any]:
    layers = reader.take("num_hidden_layers")
    first = min(reader.take("first_k_dense_replace", 3), layers)
    kinds = reader.take("mlp_layer_types", ["dense"] * first + ["sparse"] * (layers - first))
    if len(kinds) != layers:
        why = f"names {len(kinds)} layers of {layers}"
        raise reader.unsupported("mlp_layer_types", kinds, why)
    return dense_layers([kind != "sparse" for kind in kinds])


def _mtp_modules(reader: ConfigReader, tensor_names: Iterable[str]) -> int:
    """Returns the number of MTP modules; they are there if their tensors are."""
    modules = reader.take("num_mtp_layers", 1, null=0)
    modules = reader.take("num_nextn_predict_layers", modules, null=0)
    prefix = f"model.layers.{reader.take('num_hidden_layers')}."
    return modules if any(name.startswith(prefix) for name in tensor_names) else 0
