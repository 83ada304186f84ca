"""A model of DeepSeek-V3.2's shape (arXiv 2512.02556; 2412.19437 for all but the indexer): 671B parameters, 37B a token, and an MTP module. For a pod.

    .venv-compile/bin/python -m launch.plan --config=configs/deepseek_v32.py --topology=v5p:8x8x8
    python -m launch.pod --on=tpu --name=my-slice --zone=us-east5-a -- python -m launch.pretrain --config=configs/deepseek_v32.py --workdir=/mnt/runs/v32 \
        --config.data.sources="('parquet:/mnt/corpus/*.parquet#text',)"

It has been compiled and planned (docs/plan.md), not trained.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.tokenizer.kind = "file"
    c.tokenizer.path = "deepseek_v32/tokenizer.json"  # the model's own, to be fetched
    c.model.vocab = 129_280
    c.model.width = 7_168
    c.model.layers = 61
    c.model.dense_layers = 3
    c.model.dense_width = 18_432
    c.model.mtp_depth = 1
    c.model.mtp_input = "normed"
    c.model.dtype = "bfloat16"
    c.model.init_std = 0.006
    c.model.remat = "full"
    c.model.attention.heads = 128
    c.model.attention.query_rank = 1_536
    c.model.attention.latent_rank = 512
    c.model.attention.nope_width = 128
    c.model.attention.rope_width = 64
    c.model.attention.value_width = 128
    c.model.attention.gate = "none"
    c.model.indexer.heads = 64
    c.model.indexer.width = 128
    c.model.indexer.rope_width = 64
    c.model.indexer.topk = 2_048
    c.model.moe.experts = 256
    c.model.moe.chosen = 8
    c.model.moe.shared = 1
    c.model.moe.width = 2_048
    c.model.moe.groups = 8
    c.model.moe.chosen_groups = 4
    c.model.moe.group_best = 2
    c.model.moe.route_scale = 2.5

    c.mesh.data = -1
    # Heads over `tensor`: what goes up from the query's and the key-value latent is sharded over no other axis.
    c.mesh.fsdp = 8
    c.mesh.expert = 8
    c.mesh.tensor = 8

    c.data.sequence = 4_096
    c.data.batch = 15_360
    c.train.microbatches = 240  # 64 rows at a time: one to each group of 8 chips
    c.train.stage = "dense"
    c.train.steps = 235_000  # 14.8T tokens
    c.train.learning_rate = 2.2e-4
    c.train.warmup_steps = 2_000
    c.train.constant_steps = 158_000

    c.reinforce.prompts = 512
    c.reinforce.group = 8
    c.sampling.max_prompt = 1_024
    c.sampling.max_new = 1_024
    return c
