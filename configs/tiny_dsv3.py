"""tiny-dsv3, the workload of bench/: small enough for a CPU, with each part of DeepSeek-V3's block.

    python -m bench.train        8 x 256 tokens a step
    python -m bench.sample       16 prompts of 32 tokens, 128 new ones each
    python -m bench.reinforce    one GRPO step: 8 prompts x 8 completions x 64 tokens

Gate, indexer and MTP are off, as the implementations that it is compared with have none. Results
and versions: bench/results/.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    c = base.get_config()
    c.model.vocab_size = 512
    c.model.hidden_size = 256
    c.model.num_hidden_layers = 6
    c.model.first_k_dense_replace = 1
    c.model.intermediate_size = 704
    c.model.num_nextn_predict_layers = 0
    c.model.mla.num_attention_heads = 8
    c.model.mla.q_lora_rank = 128
    c.model.mla.kv_lora_rank = 64
    c.model.mla.qk_nope_head_dim = 32
    c.model.mla.qk_rope_head_dim = 16
    c.model.mla.v_head_dim = 32
    c.model.mla.gate = "none"
    c.model.indexer.n_heads = 0
    c.model.moe.num_experts = 8
    c.model.moe.num_experts_per_tok = 2
    c.model.moe.n_shared_experts = 1
    c.model.moe.intermediate_size = 176
    c.data.batch_size = 8
    c.data.seq_len = 256
    c.sampling.max_prompt_tokens = 32
    c.sampling.max_new_tokens = 128
    c.sampling.attention = "dense"
    c.reinforce.algorithm = "grpo"
    c.reinforce.kl_weight = 0.0
    c.reinforce.prompts_per_step = 8
    c.reinforce.group_size = 8
    return c
