"""A config whose programs compile in seconds, shared by the tests of plans."""

import importlib.util

import pytest

from configs import base
from experiment.config_files import with_overrides
from experiment.schema import Config, parse

SMALL = (
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model.num_nextn_predict_layers=0",
    "model.indexer.n_heads=0",
    "model.mla.num_attention_heads=2",
    "model.mla.q_lora_rank=16",
    "model.mla.kv_lora_rank=16",
    "model.moe.num_experts=4",
    "model.moe.intermediate_size=16",
    "data.seq_len=64",
    "reinforce.prompts_per_step=4",
    "reinforce.group_size=2",
    "sampling.max_prompt_tokens=16",
    "sampling.max_new_tokens=8",
    "sampling.attention=dense",
    "mesh.fsdp=2",
    "mesh.expert=2",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed here: .venv-compile has it",
)


def make_config(*overrides: str) -> Config:
    """Parses configs/base.py with FIELD=VALUE overrides."""
    return parse(with_overrides(base.get_config(), as_flags(*overrides)))


def as_flags(*overrides: str) -> list[str]:
    """Writes FIELD=VALUE overrides as words of a command line."""
    return [f"--config.{override}" for override in overrides]
