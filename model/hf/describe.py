"""Our model section as a Hugging Face config.json: the inverse of model/hf/architecture.py, for models that one of its architectures can express."""

import math
from typing import Any

from errors import UserError
from model.config import ModelConfig


class Fit:
    """What an architecture fixes; the model must have it so."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def must(self, holds: bool, field: str, value: Any, wanted: str) -> None:
        if not holds:
            raise UserError(f"model.{field} = {value!r}: {self.architecture} cannot express it ({wanted}), so it has no Hugging Face checkpoint")


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys that decide the model, in the style of transformers 5, for `model.hf.tensors.tensors(model)` in files of `dtype`.

    Raises:
      UserError: no supported architecture is this model; names the field.
    """
    kinds = {kind.attention for kind in model.kinds}
    if kinds == {"mla"}:
        own = _latent(model)
    elif kinds == {"gqa"} and model.norm == "scale":
        own = _grouped(model)
    else:
        own = _hybrid(model)
    return own | {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.dense_width,
        "tie_word_embeddings": model.tie_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": dtype,
    }


def _shared(model: ModelConfig, fit: Fit, norm: str) -> None:
    fit.must(model.canon == 0, "canon", model.canon, "no convolution before attention: 0")
    fit.must(model.norm == norm, "norm", model.norm, norm)
    fit.must(model.mtp_depth == 0 or model.mtp_input == "normed", "mtp_input", model.mtp_input, "normed")


def _rope(model: ModelConfig, fit: Fit, **more: float) -> dict[str, Any]:
    r = model.rope
    found = {"rope_theta": r.theta, "rope_type": "yarn" if r.stretch > 1 else "default"} | more
    if r.stretch > 1:
        found |= {"factor": r.stretch, "original_max_position_embeddings": r.context, "attention_factor": r.scale}
        found |= {"beta_fast": r.beta_fast, "beta_slow": r.beta_slow, "truncate": r.whole_channels}
    else:
        fit.must(r.scale == 1, "rope.scale", r.scale, "1 without rope.stretch")
    return found


def _latent(model: ModelConfig) -> dict[str, Any]:
    a, i, m, r = model.attention, model.indexer, model.moe, model.rope
    fit = Fit("DeepseekV32ForCausalLM" if i.heads else "DeepseekV3ForCausalLM")
    _shared(model, fit, "scale")
    fit.must(a.gate == "none", "attention.gate", a.gate, "none")
    fit.must(a.norm_eps == 1e-6, "attention.norm_eps", a.norm_eps, "1e-6")
    fit.must(not model.dense_also, "dense_also", model.dense_also, "only the first layers are dense")
    fit.must(model.mtp_depth == 0 or not model.tie_embeddings, "tie_embeddings", model.tie_embeddings, "False with an MTP module")
    rope = _rope(model, fit)
    if a.logit_scale != 1:
        fit.must(r.stretch > 1 and a.logit_scale > 1, "attention.logit_scale", a.logit_scale, "1 without rope.stretch")
        rope["mscale_all_dim"] = (math.sqrt(a.logit_scale) - 1) / (0.1 * math.log(r.stretch))
    found = {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "q_lora_rank": a.query_rank or None,
        "kv_lora_rank": a.latent_rank,
        "qk_nope_head_dim": a.nope_width,
        "qk_rope_head_dim": a.rope_width,
        "v_head_dim": a.value_width,
        "rope_parameters": rope,
        "first_k_dense_replace": model.dense_layers,
        "num_nextn_predict_layers": model.mtp_depth,
    }
    if model.moe_layers or model.mtp_kind.moe:
        fit.must(m.router == "sigmoid", "moe.router", m.router, "sigmoid")
        fit.must(m.router_bias, "moe.router_bias", m.router_bias, "True")
        fit.must(not m.shared_gate, "moe.shared_gate", m.shared_gate, "False")
        fit.must(m.shared_width in (0, m.width), "moe.shared_width", m.shared_width, "that of the other experts")
        best = m.group_best or max(1, m.chosen // m.chosen_groups)
        fit.must(best == 2 or m.chosen_groups == m.groups, "moe.group_best", m.group_best, "2")
    found |= {
        "n_routed_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "n_shared_experts": m.shared,
        "moe_intermediate_size": m.width,
        "n_group": m.groups,
        "topk_group": m.chosen_groups,
        "norm_topk_prob": m.normalise,
        "routed_scaling_factor": m.route_scale,
    }
    if i.heads:
        fit.must(a.query_rank > 0, "attention.query_rank", a.query_rank, "the indexer reads the query latent")
        fit.must(r.interleaved and not r.indexer_interleaved, "rope.interleaved", r.interleaved, "True, and rope.indexer_interleaved False")
        fit.must(i.rope_width == a.rope_width, "indexer.rope_width", i.rope_width, f"that of attention, {a.rope_width}")
        fit.must(i.norm_eps == 1e-6, "indexer.norm_eps", i.norm_eps, "1e-6")
        names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        return found | names | {"index_n_heads": i.heads, "index_head_dim": i.width, "index_topk": i.topk}
    return found | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "rope_interleave": r.interleaved}


def _gqa(model: ModelConfig, fit: Fit, gate: str) -> dict[str, Any]:
    g = model.gqa
    fit.must(g.gate == gate, "gqa.gate", g.gate, gate)
    fit.must(g.qk_norm, "gqa.qk_norm", g.qk_norm, "True")
    return {"num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads, "head_dim": g.head_width}


def _routed(model: ModelConfig, fit: Fit) -> dict[str, Any]:
    m = model.moe
    fit.must(m.router == "softmax", "moe.router", m.router, "softmax")
    fit.must(not m.router_bias, "moe.router_bias", m.router_bias, "False")
    fit.must(m.chosen_groups == m.groups, "moe.chosen_groups", m.chosen_groups, "all of model.moe.groups")
    fit.must(m.route_scale == 1, "moe.route_scale", m.route_scale, "1")
    return {
        "num_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "moe_intermediate_size": m.width,
        "norm_topk_prob": m.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(model.kinds) if not kind.moe],
    }


def _grouped(model: ModelConfig) -> dict[str, Any]:
    fit = Fit("Qwen3MoeForCausalLM" if model.moe_layers else "Qwen3ForCausalLM")
    _shared(model, fit, "scale")
    fit.must(model.mtp_depth == 0, "mtp_depth", model.mtp_depth, "0")
    fit.must(model.gqa.rope_width == model.gqa.head_width, "gqa.rope_width", model.gqa.rope_width, "the whole head")
    found = _gqa(model, fit, "none") | {"rope_parameters": _rope(model, fit)}
    if not model.moe_layers:
        return found | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    fit.must(model.moe.shared == 0, "moe.shared", model.moe.shared, "0")
    return found | _routed(model, fit) | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def _hybrid(model: ModelConfig) -> dict[str, Any]:
    d, g, m = model.delta, model.gqa, model.moe
    fit = Fit("Qwen3NextForCausalLM")
    _shared(model, fit, "zero_centred")
    theirs = {"delta": "linear_attention", "gqa": "full_attention"}
    fit.must("mla" not in model.attention_kinds, "attention_kinds", model.attention_kinds, "delta and gqa")
    fit.must(model.mtp_depth <= 1, "mtp_depth", model.mtp_depth, "at most 1")
    fit.must(model.moe_layers > 0, "dense_layers", model.dense_layers, "some layer with experts")
    fit.must(m.shared == 1 and m.shared_gate, "moe.shared", m.shared, "1, with moe.shared_gate")
    own = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "layer_types": [theirs[kind.attention] for kind in model.kinds],
        "linear_num_key_heads": d.key_heads,
        "linear_num_value_heads": d.value_heads,
        "linear_key_head_dim": d.key_width,
        "linear_value_head_dim": d.value_width,
        "linear_conv_kernel_dim": d.taps,
        "shared_expert_intermediate_size": m.shared_hidden,
        "rope_parameters": _rope(model, fit, partial_rotary_factor=g.rope_width / g.head_width),
    }
    return _gqa(model, fit, "element") | _routed(model, fit) | own
