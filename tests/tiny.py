"""The smallest model that has everything (a dense and two MoE layers, one MTP module, all switched
on), and ragged batches: shared by the tests.

The jitted functions here are module-level, with the config static, so that every test of a
configuration shares one compilation. Weights are drawn ten times wider than a real model's: at 0.02
attention is uniform, gates are 1/2, and a test of either could not fail.
"""

import dataclasses
import functools
from typing import cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.cache import Cache
from model.config import ModelConfig
from model.decode import read
from model.decode_weights import DecodeWeights
from model.heads import logits_of
from model.layer_configs import (
    DeltaConfig,
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    MoEConfig,
    RopeConfig,
)
from model.transformer import Output, Transformer, init
from train.config import TrainConfig

VOCAB = 61
T = 24
# Rows as lists of (segment, length); segment 0 is padding. Packed, full, padded on the left, and
# almost empty.
LAYOUT = (
    ((1, 7), (2, 11), (0, 6)),
    ((1, 24),),
    ((0, 5), (1, 12), (2, 7)),
    ((1, 3), (2, 4), (0, 17)),
)


MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    intermediate_size=48,
    canon_kernel_size=3,
    initializer_range=0.2,
    remat="none",
    rope=RopeConfig(rope_theta=100.0, original_max_position_embeddings=8),
    mla=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    gqa=GQAConfig(num_attention_heads=4, head_dim=8, rotary_dim=4),
    delta=DeltaConfig(
        num_key_heads=2,
        num_value_heads=4,
        key_head_dim=6,
        value_head_dim=8,
        conv_kernel_dim=3,
        chunk_size=8,
    ),
    indexer=IndexerConfig(head_dim=8, rope_head_dim=4, topk=4),
    moe=MoEConfig(
        num_experts=4, intermediate_size=16, n_group=2, topk_group=2, routed_scaling_factor=1.5
    ),
)
TRAIN = TrainConfig(
    stage="sparse",
    steps=10,
    learning_rate=1e-2,
    warmup_steps=2,
    constant_steps=3,
    balance_weight=0.5,
    log_every=1,
    eval_batches=1,
    save_every=1,
    max_to_keep=1,
    max_skipped=3,
)


def model_config(**changes) -> ModelConfig:
    """MODEL with fields changed; a section takes a dict of its own."""
    sections = {
        name: dataclasses.replace(getattr(MODEL, name), **fields)
        for name, fields in changes.items()
        if isinstance(fields, dict)
    }
    return dataclasses.replace(MODEL, **changes | sections)


# Qwen3-Next's parts: two repeats of a period of two kinds of layer, softmax routing without a bias,
# a gated shared expert, zero-centred norms.
HYBRID = model_config(
    num_hidden_layers=4,
    layer_types=("delta", "gqa"),
    first_k_dense_replace=0,
    canon_kernel_size=0,
    norm="zero_centred",
    mtp_input="normed",
    indexer={"n_heads": 0},
    moe={
        "scoring_func": "softmax",
        "router_bias": False,
        "shared_expert_gate": True,
        "shared_expert_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
    },
)


def train_config(**changes) -> TrainConfig:
    return dataclasses.replace(TRAIN, **changes)


@functools.lru_cache
def variables(config: ModelConfig) -> dict:
    """Parameters of `init`'s shapes, with router biases and norm scales away from where they start.
    Drawn by numpy: compiling `init` takes seconds.
    """
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(
            (config.norm == "scale") + 0.1 * noise
            if name == "scale"
            else 0.1 * noise
            if name == "bias"
            else config.initializer_range * noise
        )

    return jax.tree.map_with_path(
        draw, nn.meta.unbox(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    )


def batch_of(layout=LAYOUT, width: int = T, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens, padding included, in the segments of `layout`; weights 0, 1/2 and 1, padding
    included.
    """
    rng = np.random.default_rng(seed)
    rows = len(layout)
    segments_BT, positions_BT = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, spans in enumerate(layout):
        at = 0
        for segment, length in spans:
            segments_BT[row, at : at + length] = segment
            positions_BT[row, at : at + length] = np.arange(length) if segment else 0
            at += length
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, width)), jnp.int32),
        "positions": jnp.asarray(positions_BT),
        "segments": jnp.asarray(segments_BT),
        "weights": jnp.asarray(rng.integers(0, 3, (rows, width)) / 2, jnp.float32),
    }


def without_rows(batch: dict, keep) -> dict:
    """The batch with every row but those in `keep` made padding, and its content changed."""
    kept_B1 = jnp.isin(jnp.arange(batch["tokens"].shape[0]), jnp.asarray(keep))[:, None]
    return batch | {
        "tokens": jnp.where(kept_B1, batch["tokens"], (batch["tokens"] + 7) % VOCAB),
        "positions": jnp.where(kept_B1, batch["positions"], 0),
        "segments": jnp.where(kept_B1, batch["segments"], 0),
    }


def output_of(config: ModelConfig, variables: dict, batch: dict, stage: str) -> Output:
    """What the model gives for the batch, MTP modules included."""
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    return cast(Output, Transformer(config).apply(variables, *inputs, stage=stage))


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(config: ModelConfig, variables: dict, batch: dict, stage: str) -> dict:
    """logits_BTV of the next token, mtp_BTV of each depth, and the layers' statistics."""
    output = output_of(config, variables, batch, stage)
    head = functools.partial(logits_of, config, variables["params"])
    return {
        "logits_BTV": head(output.hidden_BTD),
        "mtp_BTV": [head(hidden_BTD) for hidden_BTD in output.mtp_hidden],
        "stats": output.stats,
    }


def decode_step(
    config: ModelConfig, weights: DecodeWeights, tokens_B: Array, cache: Cache, stage: str
) -> tuple[Cache, Array]:
    """Reads one token in every row. Returns the longer cache and the logits [B, V] for the next."""
    cache, hidden_B1D, *_ = read(
        config, weights, tokens_B[:, None], jnp.ones_like(tokens_B), cache, stage
    )
    return cache, logits_of(config, weights.params, hidden_B1D[:, 0])


def jitted_step(config: ModelConfig, stage: str):
    """Returns `decode_step`, jitted, of a cache that is donated for the longer one.

    The token is written into the arrays of the cache, and nothing of them is copied.
    """
    return jax.jit(functools.partial(decode_step, config, stage=stage), donate_argnums=2)


def tree_max(tree) -> float:
    """The largest absolute value anywhere."""
    return max((float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)), default=0.0)


def assert_close(found, expected, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """chex's assert_trees_all_close takes NaN for equal to NaN; here nothing may be NaN."""
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)
