"""Measures memory and speed of converting a checkpoint.

It makes a checkpoint of DeepSeek-V3's kind, of random numbers, and converts it to a workdir and
back, each in a separate process. It prints one line of JSON for each direction, and one that says
whether every tensor came back bit by bit.

    python -m bench.convert --gigabytes=4 --where=/tmp/convert
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from checkpoints.hf.config import model_fields
from checkpoints.hf.safetensors import DTYPES, TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from checkpoints.hf.tensors import tensors
from configs import base
from errors import UserError
from experiment.command_line import Flag, command
from experiment.model_source import with_model
from experiment.schema import parse

LAYER_EXPERTS = 32
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129_280,
    "hidden_size": 2_048,
    "intermediate_size": 4_096,
    "moe_intermediate_size": 1_024,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": LAYER_EXPERTS,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "num_nextn_predict_layers": 0,
}


def run(gigabytes: float, where: str) -> None:
    """Makes the checkpoint, converts it both ways and prints what that took."""
    if not where:
        raise UserError("--where is missing: a directory with room for four times the checkpoint")
    directory = Path(where)
    made, workdir, back = directory / "made", directory / "workdir", directory / "back"
    make(made, gigabytes)
    files = TensorFiles(made)
    sizes = [info.bytes for info in files.tensors.values()]
    for way, source, target in (
        ("in", f"hf:{made}", str(workdir)),
        ("out", str(workdir), f"hf:{back}"),
    ):
        shutil.rmtree(target.removeprefix("hf:"), ignore_errors=True)
        arguments = ["-m", "launch.convert", f"--from={source}", f"--to={target}"]
        seconds, peak = measured([sys.executable, *arguments])
        megabytes = {
            "checkpoint_mb": sum(sizes),
            "largest_tensor_mb": max(sizes),
            "allowed_mb": max(sizes) + 2**30,
            "peak_rss_mb": peak,
        }
        line = {name: round(value / 1e6) for name, value in megabytes.items()}
        print(json.dumps({"bench": "convert", "way": way} | line | {"seconds": round(seconds, 1)}))
    exact = all(equal(files, TensorFiles(back), name) for name in files.tensors)
    print(json.dumps({"bench": "convert", "way": "in and out", "bit_exact": exact}))


def make(directory: Path, gigabytes: float) -> None:
    """Writes a checkpoint with the fewest layers that have at least `gigabytes` in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = []
    for layers in range(2, 1_000):
        (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        # The fields come from config.json alone: the tensors are yet to be written.
        model = parse(with_model(base.get_config(), model_fields(directory))).model
        wanted = tensors(model)
        if sum(math.prod(tensor.shape) for tensor in wanted) * 2 >= gigabytes * 1e9:
            break
    plan = [
        (tensor.name, DTYPES["F32" if tensor.name.endswith("bias") else "BF16"], tensor.shape)
        for tensor in wanted
    ]
    # The noise's length is a multiple of no matrix's width.
    noise = np.random.default_rng(0).normal(size=2**22 + 12_345).astype(DTYPES["BF16"])
    source = f"bench.convert {gigabytes}"
    with TensorWriter(directory, plan, source, shard_bytes=2_000_000_000) as writer:
        offset = 0
        for name, dtype, shape in plan:
            if name in writer.done:
                continue
            rows = max(1, noise.size // max(1, math.prod(shape[1:])))
            for start in range(0, shape[0], rows):
                block = (min(rows, shape[0] - start), *shape[1:])
                values = np.resize(np.roll(noise, -offset)[: math.prod(block)], block)
                writer.write(name, values.astype(dtype))
                offset = (offset + 7_919) % noise.size


def measured(arguments: list[str]) -> tuple[float, int]:
    """Runs a process and returns its seconds and its peak resident memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(arguments, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(arguments[1:])}: failed")
    return time.monotonic() - began, usage.ru_maxrss * 1024


def equal(one: TensorFiles, other: TensorFiles, name: str) -> bool:
    """Returns whether a tensor has the same bits in both."""
    info = one.tensors[name]
    step = max(1, 2**24 // max(1, math.prod(info.shape[1:])))
    blocks = ((start, min(start + step, info.shape[0])) for start in range(0, info.shape[0], step))
    return info[:2] == other.tensors[name][:2] and all(
        one.read(name, *block).tobytes() == other.read(name, *block).tobytes() for block in blocks
    )


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={
            "gigabytes": Flag(4.0, "size of the checkpoint"),
            "where": Flag("", "a directory for all files, which are kept"),
        },
    )
