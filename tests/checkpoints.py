"""A small Hugging Face checkpoint of random numbers, made by our own writer: for tests of what is done with one, where tests/golden is for what is in it."""

import json
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from model.hf.describe import config_json
from model.hf.safetensors import TensorWriter
from model.hf.tensors import tensors
from tests import tiny

# Qwen3-MoE's kind, with room for bytes and a few marks.
MODEL = tiny.model_config(
    layers=2,
    attention_kinds=("gqa",),
    dense_layers=1,
    canon=0,
    mtp_depth=0,
    vocab=288,
    indexer={"heads": 0},
    gqa={"gate": "none", "rope_width": 8},
    moe={"router": "softmax", "router_bias": False, "shared": 0, "groups": 1, "chosen_groups": 1, "route_scale": 1.0},
)


def write_checkpoint(directory: Path, model: ModelConfig = MODEL, **keys) -> Path:
    """config.json, with these keys besides, and model.safetensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(model, "float32") | keys))
    rng, own = np.random.default_rng(0), [tensor for tensor in tensors(model) if not tensor.copy_of]
    with TensorWriter(directory, [(tensor.name, np.dtype(np.float32), tensor.shape) for tensor in own], "test") as writer:
        for tensor in own:
            noise = rng.normal(size=tensor.shape).astype(np.float32)
            writer.write(tensor.name, 1 + 0.1 * noise if "norm" in tensor.name else 0.2 * noise)
    return directory
