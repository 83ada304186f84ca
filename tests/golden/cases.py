"""The cases: the config.json of each checkpoint, and how its weights are drawn."""

import re
from dataclasses import dataclass
from typing import Any

import torch

ROWS = 2
NEW_TOKENS = 10


@dataclass(frozen=True)
class Case:
    """A checkpoint that is made, and the tokens that it is run on."""

    config: dict[str, Any]
    length: int  # tokens a row
    seed: int  # such that no discrete choice hangs on rounding (margins.py)
    # `config` is config.json word for word, in the keys that the model's makers released; otherwise
    # `save_pretrained` writes config.json.
    released: bool = False
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    shards: int = 1
    mtp: bool = False


# Every width differs from every other, and the ramp is partial: pairs 0 and 1 of 6 turn as before,
# 4 and 5 are slowed, 2 and 3 lie between. The latents' norms have an epsilon of 1e-6 whatever
# rms_norm_eps says. Three experts a group, so that the sum of the best two is neither the best one
# nor the sum of all.
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 80,
    "hidden_size": 48,
    "intermediate_size": 52,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 1.0,
        "beta_slow": 0.2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {  # ramp: 0, 1/2, 1, 1
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
        "type": "yarn",
    },
    "rope_theta": 100,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
}

DEEPSEEK_V3_RELEASED = RELEASED | {
    "hidden_size": 40,
    "intermediate_size": 68,
    "kv_lora_rank": 22,
    "moe_intermediate_size": 18,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 14,
    "vocab_size": 96,
}

# Rows and columns on both sides of 128: blocks are whole, partial, and partial in both directions.
DEEPSEEK_V3_FP8 = RELEASED | {
    "hidden_size": 160,
    "intermediate_size": 144,
    "kv_lora_rank": 40,
    "moe_intermediate_size": 20,
    "n_group": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "topk_group": 1,
    "v_head_dim": 10,
    "vocab_size": 64,
}

DEEPSEEK_V32 = {
    "model_type": "deepseek_v32",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 18,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "index_topk": 6,
    "index_n_heads": 3,
    "index_head_dim": 12,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {  # ramp: 0, 1/3, 2/3, 1
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 0.3,
        "mscale": 1.4,
        "mscale_all_dim": 0.8,
    },
}

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 300.0,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    },  # ramp: 0, 1/2, 1, ...
}

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 52,
    "moe_intermediate_size": 18,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}

# head_dim is not in config.json: it is width / heads = 12.
QWEN3_MOE_STEP = {key: value for key, value in QWEN3_MOE.items() if key != "head_dim"} | {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
}

QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 52,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}

CASES = {
    "deepseek_v3": Case(DEEPSEEK_V3, length=48, seed=30, shards=3, mtp=True),
    "deepseek_v3_released": Case(
        DEEPSEEK_V3_RELEASED, length=48, seed=25, released=True, dtype=torch.bfloat16
    ),
    "deepseek_v3_fp8": Case(
        DEEPSEEK_V3_FP8, length=40, seed=3, released=True, dtype=torch.bfloat16, fp8=True
    ),
    "deepseek_v32": Case(DEEPSEEK_V32, length=40, seed=14, mtp=True),
    "qwen3": Case(QWEN3, length=22, seed=2),
    "qwen3_moe": Case(QWEN3_MOE, length=40, seed=9),
    "qwen3_moe_step": Case(QWEN3_MOE_STEP, length=40, seed=2),
    "qwen3_next": Case(QWEN3_NEXT, length=72, seed=13, mtp=True),
}

# (name, mean, spread, whether the spread is divided by sqrt(inputs)); the first that matches. Wide
# enough for attention to be far from uniform, gates from 1/2, decays from 0 and 1, and logits to
# have a standard deviation of about 3: in a checkpoint drawn at 0.02 few mistakes would show.
RULES = [
    (r"lm_head", 0.0, 3.0, True),
    (r"embed_tokens", 0.0, 1.0, False),
    # Of both signs, and negative enough for a score with it to fall below the 0 of a careless mask.
    (r"e_score_correction_bias", -0.35, 0.35, False),
    (r"indexer\.k_norm\.bias", 0.0, 0.5, False),
    (r"A_log", -1.0, 0.7, False),
    (r"dt_bias", 0.0, 1.0, False),
    (r"conv1d", 0.0, 0.6, False),
    (r"in_proj_ba|in_proj_qkvz", 0.0, 1.5, True),
    (r"(mlp\.gate|shared_expert_gate|weights_proj)\.weight", 0.0, 2.0, True),
    (r"linear_attn\.norm", 1.0, 0.3, False),
    (r"[qk]_norm\.weight", 1.4, 0.3, False),
    (r"norm\.weight", 1.0, 0.3, False),
    (r"q_proj|q_b_proj|wq_b|indexer\.wk", 0.0, 1.5, True),
    (r"\.(gate_proj|gate_up_proj)", 0.0, 1.5, True),
    (r"o_proj", 0.0, 1.7, True),
    (r"down_proj", 0.0, 0.7, True),  # so that attention is not drowned
    (r"", 0.0, 1.2, True),
]


def draw(model: torch.nn.Module, seed: int) -> None:
    """Fills the parameters, and the router's bias, by RULES, in the order of their names."""
    rng = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    }
    for name, tensor in sorted(tensors.items()):
        mean, spread, per_input = next(rule[1:] for rule in RULES if re.search(rule[0], name))
        if model.config.tie_word_embeddings and "embed_tokens" in name:
            spread, per_input = 3.0, True
        if (
            model.config.model_type == "qwen3_next"
            and "norm.weight" in name
            and "linear_attn" not in name
        ):
            mean -= 1.0  # these norms multiply by 1 + weight
        with torch.no_grad():
            tensor.copy_(
                mean
                + spread
                * tensor.shape[-1] ** (-0.5 * per_input)
                * torch.randn(tensor.shape, generator=rng)
            )
            if "wq_b" in name:
                # Head 1 is head 0 turned round: one of the two is above the ReLU for nearly every
                # key, so scores of exactly 0, which tie, are rare.
                width = model.config.index_head_dim
                tensor[width : 2 * width] = 0.1 * tensor[width : 2 * width] - tensor[:width]


def prompts(case: Case) -> torch.Tensor:
    """Returns the token ids [B, T] that a case is run on."""
    return torch.randint(
        case.config["vocab_size"],
        (ROWS, case.length),
        generator=torch.Generator().manual_seed(case.seed + 1000),
    )
