r"""Measures the training workload of bench.train in MaxText, to compare with.

    pip install "maxtext[tpu]"
    python bench/maxtext_tiny.py [KEY=VALUE ...]
    python -m bench.side_by_side "python -m bench.train" \
        "/path/to/maxtext/python bench/maxtext_tiny.py"

Install MaxText in a separate environment with Python 3.12 (it has no extra for CPU); KEY=VALUE
changes its settings. It prints one JSON line like bench.train's, by MaxText's own train step,
optimizer and synthetic batch: DeepSeek-V3's block at the size of configs/tiny_dsv3.py, float32, on
CPU, dropless, with the router's bias and the sequence-wise balance loss, without MTP.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

os.environ.update(JAX_PLATFORMS="cpu", DECOUPLE_GCLOUD="TRUE")
try:
    with contextlib.redirect_stdout(sys.stderr):
        import jax
        from flax import nnx
        from flax.core.spmd import logical_axis_rules
        from maxtext.trainers.pre_train import train
        from maxtext.utils import sharding, train_utils
except ImportError as missing:
    print(f'{missing.name} is needed: pip install "maxtext[tpu]"', file=sys.stderr)
    sys.exit(2)

REPEATS = 10
SETTINGS = {
    # MaxText tells DeepSeek-V3's router by the name; every size below is overridden.
    "model_name": "deepseek3-tiny",
    "override_model_config": True,
    "vocab_size": 512,
    "base_emb_dim": 256,
    "base_num_decoder_layers": 6,
    "first_num_dense_layers": 1,
    "base_mlp_dim": 704,
    "base_moe_mlp_dim": 176,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "routed_bias_update_rate": 1e-3,
    "load_balance_loss_weight": 1e-4,
    "moe_use_megatron_seq_aux_loss": True,  # DeepSeek-V3's own balance loss
    "base_num_query_heads": 8,
    "base_num_kv_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_type": "default",
    "max_position_embeddings": 256,
    "max_target_length": 256,
    "per_device_batch_size": 8,
    "dataset_type": "synthetic",
    "packing": False,
    "steps": 1_000,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "hardware": "cpu",
    "attention": "dot_product",
    # These are the fastest of those tried, on one busy core, that drop no token: every expert on
    # every token rather than ragged_dot, layers unrolled rather than scanned, and kept for the
    # backward pass what attention made but not the experts' hidden states ("minimal_with_context"
    # keeps these, "full" nothing).
    "sparse_matmul": False,
    "megablox": False,
    "scan_layers": False,
    "remat_policy": "custom",
    **dict.fromkeys(
        (
            "query_proj",
            "key_proj",
            "value_proj",
            "kv_proj",
            "qkv_proj",
            "out_proj",
            "query_wa_proj",
            "kv_wa_proj",
        ),
        "device",
    ),
    **dict.fromkeys(("mla_q", "mla_kv", "attention_out", "context"), "device"),
    "run_name": "tiny_dsv3",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "enable_tensorboard": False,
    "log_config": False,
    "jax_cache_dir": "",
}


def measure(settings: list[str]) -> dict:
    """Trains with settings KEY=VALUE of MaxText and returns the figures of the JSON line."""
    config, recorder = train.initialize(["", *settings])
    *_, shardings, model, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(
        config, recorder
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    graph, state = nnx.split(state)
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=params_shardings
    )
    times = []
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        for repeat in range(-2, REPEATS):
            began = time.perf_counter()
            state, metrics = step(state, loader.load_next_batch())
            jax.block_until_ready(metrics)
            if repeat >= 0:
                times.append(time.perf_counter() - began)
    median = statistics.median(times)
    tokens = config.global_batch_size_to_train_on * config.max_target_length
    return {
        "tokens_per_s": round(tokens / median, 1),
        "seconds_median": round(median, 4),
        "parameters": parameters,
    }


def main(changes: list[str]) -> None:
    """Prints the JSON line; everything that MaxText prints goes to stderr."""
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        settings = (
            SETTINGS
            | {"base_output_directory": output}
            | dict(change.split("=", 1) for change in changes)
        )
        result = measure([f"{key}={value}" for key, value in settings.items()])
    versions = {"jax": version("jax"), "maxtext": version("maxtext")}
    print(json.dumps({"bench": "train"} | result | versions))


if __name__ == "__main__":
    if not all("=" in change for change in sys.argv[1:]):
        sys.exit("usage: python bench/maxtext_tiny.py [KEY=VALUE ...]")
    main(sys.argv[1:])
