"""tiny-dsv3, the workload of bench/: small enough for a CPU, with every part of DeepSeek-V3's block.

    python -m bench.train        8 x 256 tokens a step
    python -m bench.sample       16 prompts of 32 tokens, 128 new ones each
    python -m bench.reinforce    one GRPO step: 8 prompts x 8 completions x 64 tokens

Gate, indexer and MTP are off, as the implementations it is compared with have none. Results and versions: bench/results/.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.vocab = 512
    c.model.width = 256
    c.model.layers = 6
    c.model.dense_layers = 1
    c.model.dense_width = 704
    c.model.mtp_depth = 0
    c.model.attention.heads = 8
    c.model.attention.query_rank = 128
    c.model.attention.latent_rank = 64
    c.model.attention.nope_width = 32
    c.model.attention.rope_width = 16
    c.model.attention.value_width = 32
    c.model.attention.gate = "none"
    c.model.indexer.heads = 0
    c.model.moe.experts = 8
    c.model.moe.chosen = 2
    c.model.moe.shared = 1
    c.model.moe.width = 176
    c.data.batch = 8
    c.data.sequence = 256
    c.sampling.max_prompt = 32
    c.sampling.max_new = 128
    c.sampling.attention = "dense"
    c.reinforce.algorithm = "grpo"
    c.reinforce.kl_weight = 0.0
    c.reinforce.prompts = 8
    c.reinforce.group = 8
    return c
