"""A model of DeepSeek-V2-Lite's shape (arXiv 2405.04434, appendix B; Moonlight, arXiv 2502.16982, has the same), with this codebase's router, gate and indexer:
16B parameters, 3B a token. For 16 chips.

    .venv-compile/bin/python -m launch.plan --config=configs/moe_16b.py --topology=v5p:2x2x4
    python -m launch.pretrain --config=configs/moe_16b.py --workdir=runs/moe_16b --config.data.sources="('parquet:corpus/*.parquet#text',)"

It has been compiled and planned (docs/plan.md), not trained.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.tokenizer.vocab = 102_400
    c.model.width = 2_048
    c.model.layers = 27
    c.model.dense_layers = 1
    c.model.dense_width = 10_944
    c.model.mtp_depth = 0
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.attention.heads = 16
    c.model.attention.query_rank = 0
    c.model.attention.latent_rank = 512
    c.model.attention.nope_width = 128
    c.model.attention.rope_width = 64
    c.model.attention.value_width = 128
    c.model.indexer.heads = 16
    c.model.indexer.width = 64
    c.model.indexer.rope_width = 32
    c.model.indexer.topk = 1_024
    c.model.moe.experts = 64
    c.model.moe.chosen = 6
    c.model.moe.shared = 2
    c.model.moe.width = 1_408
    c.model.moe.route_scale = 2.446

    c.mesh.data = -1
    c.mesh.fsdp = 4
    c.mesh.expert = 4

    c.data.sequence = 4_096
    c.data.batch = 256
    c.train.microbatches = 8  # 32 rows at a time
    c.train.steps = 100_000
    c.train.learning_rate = 4.2e-4
    c.train.warmup_steps = 2_000

    c.reinforce.prompts = 64
    c.reinforce.group = 8
    c.sampling.max_prompt = 1_024
    c.sampling.max_new = 1_024
    return c
