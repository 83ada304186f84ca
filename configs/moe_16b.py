r"""A model of DeepSeek-V2-Lite's shape, for 16 chips: 16B parameters, 3B a token.

    .venv-compile/bin/python -m launch.plan --config=configs/moe_16b.py --topology=v5p:2x2x4
    python -m launch.pretrain --config=configs/moe_16b.py --workdir=runs/moe_16b \
        --config.data.sources="('parquet:corpus/*.parquet#text',)"

The shape is that of arXiv 2405.04434, appendix B (Moonlight, arXiv 2502.16982, has it too), with
this codebase's router, gate and indexer. The config is compiled and planned (docs/plan.md), and
not trained.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    c = base.get_config()
    c.tokenizer.vocab_size = 102_400
    c.model.hidden_size = 2_048
    c.model.num_hidden_layers = 27
    c.model.first_k_dense_replace = 1
    c.model.intermediate_size = 10_944
    c.model.num_nextn_predict_layers = 0
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.mla.num_attention_heads = 16
    c.model.mla.q_lora_rank = 0
    c.model.mla.kv_lora_rank = 512
    c.model.mla.qk_nope_head_dim = 128
    c.model.mla.qk_rope_head_dim = 64
    c.model.mla.v_head_dim = 128
    c.model.indexer.n_heads = 16
    c.model.indexer.head_dim = 64
    c.model.indexer.rope_head_dim = 32
    c.model.indexer.topk = 1_024
    c.model.moe.num_experts = 64
    c.model.moe.num_experts_per_tok = 6
    c.model.moe.n_shared_experts = 2
    c.model.moe.intermediate_size = 1_408
    c.model.moe.routed_scaling_factor = 2.446

    c.mesh.data = -1
    c.mesh.fsdp = 4
    c.mesh.expert = 4

    c.data.seq_len = 4_096
    c.data.batch_size = 256
    c.train.microbatches = 8  # 32 rows at a time
    c.train.steps = 100_000
    c.train.learning_rate = 4.2e-4
    c.train.warmup_steps = 2_000

    c.reinforce.prompts_per_step = 64
    c.reinforce.group_size = 8
    c.sampling.max_prompt_tokens = 1_024
    c.sampling.max_new_tokens = 1_024
    return c
