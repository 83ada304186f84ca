"""A small Hugging Face checkpoint of random numbers, made by our own writer.

It serves tests of what commands do with a checkpoint; tests/golden is for what models compute.
"""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

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
# Earlier thoughts of the assistant are left out.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last"
    " else m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = (
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)


def write_tokenizer(directory: Path) -> None:
    """Writes a tokenizer of bytes with an <|end|> that ends turns, and TEMPLATE."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": "<|endoftext|>"})
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)


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
