r"""A model of DeepSeek-V3.2's shape, for a pod: 671B parameters, 37B a token, and an MTP module.

    .venv-compile/bin/python -m launch.plan --config=configs/deepseek_v32.py --topology=v5p:8x8x8
    python -m launch.pod --on=tpu --name=my-slice --zone=us-east5-a -- \
        python -m launch.pretrain --config=configs/deepseek_v32.py --workdir=/mnt/runs/v32 \
        --config.data.sources="('parquet:/mnt/corpus/*.parquet#text',)"

The shape is that of arXiv 2412.19437, the indexer that of arXiv 2512.02556. The config is compiled
and planned (docs/plan.md), and not trained.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    c = base.get_config()
    c.tokenizer.kind = "file"
    c.tokenizer.path = "deepseek_v32/tokenizer.json"  # the model's own, to be fetched
    c.model.vocab_size = 129_280
    c.model.hidden_size = 7_168
    c.model.num_hidden_layers = 61
    c.model.first_k_dense_replace = 3
    c.model.intermediate_size = 18_432
    c.model.num_nextn_predict_layers = 1
    c.model.mtp_input = "normed"
    c.model.dtype = "bfloat16"
    c.model.initializer_range = 0.006
    c.model.remat = "full"
    c.model.mla.num_attention_heads = 128
    c.model.mla.q_lora_rank = 1_536
    c.model.mla.kv_lora_rank = 512
    c.model.mla.qk_nope_head_dim = 128
    c.model.mla.qk_rope_head_dim = 64
    c.model.mla.v_head_dim = 128
    c.model.mla.gate = "none"
    c.model.indexer.n_heads = 64
    c.model.indexer.head_dim = 128
    c.model.indexer.rope_head_dim = 64
    c.model.indexer.topk = 2_048
    c.model.moe.num_experts = 256
    c.model.moe.num_experts_per_tok = 8
    c.model.moe.n_shared_experts = 1
    c.model.moe.intermediate_size = 2_048
    c.model.moe.n_group = 8
    c.model.moe.topk_group = 4
    c.model.moe.group_topk = 2
    c.model.moe.routed_scaling_factor = 2.5

    c.mesh.data = -1
    # Heads over `tensor`: what goes up from the query's and the key-value latent is sharded over no
    # other axis.
    c.mesh.fsdp = 8
    c.mesh.expert = 8
    c.mesh.tensor = 8

    c.data.seq_len = 4_096
    c.data.batch_size = 15_360
    c.train.microbatches = 240  # 64 rows at a time: one to each group of 8 chips
    c.train.stage = "dense"
    c.train.steps = 235_000  # 14.8T tokens
    c.train.learning_rate = 2.2e-4
    c.train.warmup_steps = 2_000
    c.train.constant_steps = 158_000

    c.reinforce.prompts_per_step = 512
    c.reinforce.group_size = 8
    c.sampling.max_prompt_tokens = 1_024
    c.sampling.max_new_tokens = 1_024
    return c
