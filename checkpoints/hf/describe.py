"""Our model section as a Hugging Face config.json: the inverse of checkpoints/hf/architecture.py,
for models that one of its architectures can express.
"""

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
            raise UserError(
                f"model.{field} = {value!r}: {self.architecture} cannot express it ({wanted}), so it has no Hugging Face checkpoint"
            )


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys that decide the model, in the style of transformers 5, for
    `model.hf.tensors.tensors(model)` in files of `dtype`.

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
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "intermediate_size": model.intermediate_size,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": dtype,
    }


def _shared(model: ModelConfig, fit: Fit, norm: str) -> None:
    fit.must(
        model.canon_kernel_size == 0,
        "canon_kernel_size",
        model.canon_kernel_size,
        "no convolution before attention: 0",
    )
    fit.must(model.norm == norm, "norm", model.norm, norm)
    fit.must(
        model.num_nextn_predict_layers == 0 or model.mtp_input == "normed",
        "mtp_input",
        model.mtp_input,
        "normed",
    )


def _rope(model: ModelConfig, fit: Fit, **more: float) -> dict[str, Any]:
    r = model.rope
    found = {"rope_theta": r.rope_theta, "rope_type": "yarn" if r.factor > 1 else "default"} | more
    if r.factor > 1:
        found |= {
            "factor": r.factor,
            "original_max_position_embeddings": r.original_max_position_embeddings,
            "attention_factor": r.attention_factor,
        }
        found |= {"beta_fast": r.beta_fast, "beta_slow": r.beta_slow, "truncate": r.truncate}
    else:
        fit.must(
            r.attention_factor == 1,
            "rope.attention_factor",
            r.attention_factor,
            "1 without rope.stretch",
        )
    return found


def _latent(model: ModelConfig) -> dict[str, Any]:
    a, i, m, r = model.mla, model.indexer, model.moe, model.rope
    fit = Fit("DeepseekV32ForCausalLM" if i.n_heads else "DeepseekV3ForCausalLM")
    _shared(model, fit, "scale")
    fit.must(a.gate == "none", "mla.gate", a.gate, "none")
    fit.must(a.norm_eps == 1e-6, "mla.norm_eps", a.norm_eps, "1e-6")
    fit.must(
        not model.mlp_only_layers,
        "mlp_only_layers",
        model.mlp_only_layers,
        "only the first layers are dense",
    )
    fit.must(
        model.num_nextn_predict_layers == 0 or not model.tie_word_embeddings,
        "tie_word_embeddings",
        model.tie_word_embeddings,
        "False with an MTP module",
    )
    rope = _rope(model, fit)
    if a.logit_scale != 1:
        fit.must(
            r.factor > 1 and a.logit_scale > 1,
            "mla.logit_scale",
            a.logit_scale,
            "1 without rope.stretch",
        )
        rope["mscale_all_dim"] = (math.sqrt(a.logit_scale) - 1) / (0.1 * math.log(r.factor))
    found = {
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_attention_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "rope_parameters": rope,
        "first_k_dense_replace": model.first_k_dense_replace,
        "num_nextn_predict_layers": model.num_nextn_predict_layers,
    }
    if model.moe_layers or model.mtp_kind.moe:
        fit.must(m.scoring_func == "sigmoid", "moe.scoring_func", m.scoring_func, "sigmoid")
        fit.must(m.router_bias, "moe.router_bias", m.router_bias, "True")
        fit.must(not m.shared_expert_gate, "moe.shared_expert_gate", m.shared_expert_gate, "False")
        fit.must(
            m.shared_expert_intermediate_size in (0, m.intermediate_size),
            "moe.shared_expert_intermediate_size",
            m.shared_expert_intermediate_size,
            "that of the other experts",
        )
        best = m.group_topk or max(1, m.num_experts_per_tok // m.topk_group)
        fit.must(best == 2 or m.topk_group == m.n_group, "moe.group_topk", m.group_topk, "2")
    found |= {
        "n_routed_experts": m.num_experts,
        "num_experts_per_tok": m.num_experts_per_tok,
        "n_shared_experts": m.n_shared_experts,
        "moe_intermediate_size": m.intermediate_size,
        "n_group": m.n_group,
        "topk_group": m.topk_group,
        "norm_topk_prob": m.norm_topk_prob,
        "routed_scaling_factor": m.routed_scaling_factor,
    }
    if i.n_heads:
        fit.must(
            a.q_lora_rank > 0,
            "mla.q_lora_rank",
            a.q_lora_rank,
            "the indexer reads the query latent",
        )
        fit.must(
            r.rope_interleave and not r.indexer_rope_interleave,
            "rope.rope_interleave",
            r.rope_interleave,
            "True, and rope.indexer_interleaved False",
        )
        fit.must(
            i.rope_head_dim == a.qk_rope_head_dim,
            "indexer.rope_head_dim",
            i.rope_head_dim,
            f"that of attention, {a.qk_rope_head_dim}",
        )
        fit.must(i.norm_eps == 1e-6, "indexer.norm_eps", i.norm_eps, "1e-6")
        names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        return (
            found
            | names
            | {"index_n_heads": i.n_heads, "index_head_dim": i.head_dim, "index_topk": i.topk}
        )
    return found | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rope_interleave": r.rope_interleave,
    }


def _gqa(model: ModelConfig, fit: Fit, gate: str) -> dict[str, Any]:
    g = model.gqa
    fit.must(g.gate == gate, "gqa.gate", g.gate, gate)
    fit.must(g.qk_norm, "gqa.qk_norm", g.qk_norm, "True")
    return {
        "num_attention_heads": g.num_attention_heads,
        "num_key_value_heads": g.num_key_value_heads,
        "head_dim": g.head_dim,
    }


def _routed(model: ModelConfig, fit: Fit) -> dict[str, Any]:
    m = model.moe
    fit.must(m.scoring_func == "softmax", "moe.scoring_func", m.scoring_func, "softmax")
    fit.must(not m.router_bias, "moe.router_bias", m.router_bias, "False")
    fit.must(m.topk_group == m.n_group, "moe.topk_group", m.topk_group, "all of model.moe.n_group")
    fit.must(
        m.routed_scaling_factor == 1, "moe.routed_scaling_factor", m.routed_scaling_factor, "1"
    )
    return {
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.num_experts_per_tok,
        "moe_intermediate_size": m.intermediate_size,
        "norm_topk_prob": m.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(model.kinds) if not kind.moe],
    }


def _grouped(model: ModelConfig) -> dict[str, Any]:
    fit = Fit("Qwen3MoeForCausalLM" if model.moe_layers else "Qwen3ForCausalLM")
    _shared(model, fit, "scale")
    fit.must(
        model.num_nextn_predict_layers == 0,
        "num_nextn_predict_layers",
        model.num_nextn_predict_layers,
        "0",
    )
    fit.must(
        model.gqa.rotary_dim == model.gqa.head_dim,
        "gqa.rotary_dim",
        model.gqa.rotary_dim,
        "the whole head",
    )
    found = _gqa(model, fit, "none") | {"rope_parameters": _rope(model, fit)}
    if not model.moe_layers:
        return found | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    fit.must(
        model.moe.n_shared_experts == 0, "moe.n_shared_experts", model.moe.n_shared_experts, "0"
    )
    return (
        found
        | _routed(model, fit)
        | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    )


def _hybrid(model: ModelConfig) -> dict[str, Any]:
    d, g, m = model.delta, model.gqa, model.moe
    fit = Fit("Qwen3NextForCausalLM")
    _shared(model, fit, "zero_centred")
    theirs = {"delta": "linear_attention", "gqa": "full_attention"}
    fit.must("mla" not in model.layer_types, "attention_kinds", model.layer_types, "delta and gqa")
    fit.must(
        model.num_nextn_predict_layers <= 1,
        "num_nextn_predict_layers",
        model.num_nextn_predict_layers,
        "at most 1",
    )
    fit.must(
        model.moe_layers > 0,
        "first_k_dense_replace",
        model.first_k_dense_replace,
        "some layer with experts",
    )
    fit.must(
        m.n_shared_experts == 1 and m.shared_expert_gate,
        "moe.n_shared_experts",
        m.n_shared_experts,
        "1, with moe.shared_gate",
    )
    own = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "layer_types": [theirs[kind.attention] for kind in model.kinds],
        "linear_num_key_heads": d.num_key_heads,
        "linear_num_value_heads": d.num_value_heads,
        "linear_key_head_dim": d.key_head_dim,
        "linear_value_head_dim": d.value_head_dim,
        "linear_conv_kernel_dim": d.conv_kernel_dim,
        "shared_expert_intermediate_size": m.shared_intermediate_size,
        "rope_parameters": _rope(model, fit, partial_rotary_factor=g.rotary_dim / g.head_dim),
    }
    return _gqa(model, fit, "element") | _routed(model, fit) | own
