"""A small Hugging Face checkpoint of random numbers, made by our own writer.

It serves tests of what commands do with a checkpoint; tests/golden is for what models compute.
"""

import json
from pathlib import Path

import numpy as np

from checkpoints.hf.config import config_json
from checkpoints.hf.safetensors_writer import TensorWriter
from checkpoints.hf.tensors import tensors
from model.config import ModelConfig
from tests import tiny

# Qwen3-MoE's kind, with room for bytes and a few marks.
MODEL = tiny.model_config(
    num_hidden_layers=2,
    layer_types=("gqa",),
    first_k_dense_replace=1,
    canon_kernel_size=0,
    num_nextn_predict_layers=0,
    vocab_size=288,
    indexer={"n_heads": 0},
    gqa={"gate": "none", "rotary_dim": 8},
    moe={
        "scoring_func": "softmax",
        "router_bias": False,
        "n_shared_experts": 0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
)


def write_checkpoint(directory: Path, model: ModelConfig = MODEL, **keys) -> Path:
    """Writes config.json, with these keys too, and model.safetensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(model, "float32") | keys))
    rng, own = np.random.default_rng(0), [tensor for tensor in tensors(model) if not tensor.copy_of]
    with TensorWriter(
        directory, [(tensor.name, np.dtype(np.float32), tensor.shape) for tensor in own], "test"
    ) as writer:
        for tensor in own:
            noise = rng.normal(size=tensor.shape).astype(np.float32)
            writer.write(tensor.name, 1 + 0.1 * noise if "norm" in tensor.name else 0.2 * noise)
    return directory
