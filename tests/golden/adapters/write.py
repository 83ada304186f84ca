"""Writes adapters of random numbers over golden checkpoints, by our own writer.

    python -m tests.golden.adapters.write      in the project's environment

`record.py` beside this file has peft read them.
"""

from pathlib import Path

import jax
import numpy as np

from checkpoints.hf.peft import write_adapters
from model.sharding import is_named
from tests.model.golden import model
from train.config import TrainConfig
from train.lora import Lora, lora_of
from train.optimizer import path_of

HERE = Path(__file__).parent
CASES = ("deepseek_v3", "qwen3_next")
# Logits move by about 1, as record.py prints.
TRAIN = TrainConfig(
    lora=2,
    lora_alpha=3.0,
    lora_modules=("attention", "ffn", "experts", "shared_experts", "router"),
    mtp_weight=0.0,
)
SPREAD = {"a": 0.05, "b": 0.01}


def lora(case: str) -> Lora:
    """Returns which matrices of a case have adapters."""
    found = lora_of(model(case), TRAIN)
    assert found is not None
    return found


def drawn(case: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns the adapters of a case, unscaled, by the path of their matrix."""
    rng, found = np.random.default_rng(0), {}
    boxes = lora(case).boxes(model(case))["params"]
    for path, box in jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_named):
        matrix, _, name = path_of(path).rpartition("/")
        values = rng.normal(0, SPREAD[name], box.value.shape).astype(np.float32)
        found.setdefault(matrix, {})[name] = values
    return found


def write(case: str, directory: Path) -> None:
    """Writes the adapters of a case in peft's format."""
    own = lora(case)
    write_adapters(
        directory, model(case), drawn(case), rank=own.rank, scale=own.scale, base=f"../{case}"
    )


if __name__ == "__main__":
    for name in CASES:
        write(name, HERE / name / "ours")
