"""Measures the workloads of bench.train and bench.sample in transformers on torch, to compare with.

    pip install torch transformers
    python bench/transformers_tiny.py train
    python bench/transformers_tiny.py train --compile
    python bench/transformers_tiny.py sample

Install torch and transformers in a separate environment. It prints one JSON line like bench.train's
and bench.sample's, of DeepseekV3ForCausalLM at the size of configs/tiny_dsv3.py, float32, with
fused AdamW, gradient clipping, and the default implementations of attention (sdpa) and of the
experts (grouped_mm). It is eager; with --compile the model is compiled as one graph (torch.compile,
fullgraph), and its optimizer stays the fused one.
"""

import json
import os
import statistics
import sys
import time

# Drops this directory: transformers would take bench/kernels.py for the package "kernels".
del sys.path[0]

try:
    import torch
    import transformers
except ImportError as missing:
    sys.exit(f"{missing.name} is needed: pip install torch transformers")

REPEATS = 10
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "intermediate_size": 704,
    "moe_intermediate_size": 176,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def train(model) -> int:
    """Takes one step on 8 x 256 tokens and returns the number of tokens."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model.optimizer = optimizer
    tokens = torch.randint(0, 512, (8, 256))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return tokens.numel()


def sample(model) -> int:
    """Samples 128 tokens after each of 16 prompts of 32 and returns the number of tokens."""
    prompts = torch.randint(0, 512, (16, 32))
    with torch.no_grad():
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=128,
            min_new_tokens=128,
            do_sample=True,
            pad_token_id=0,
        )
    return 16 * 128


def main(name: str, compiled: bool) -> None:
    """Times "train" or "sample" and prints the JSON line."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES))
    if compiled:
        model.compile(fullgraph=True)
    action = {"train": train, "sample": sample}[name]
    times = []
    for repeat in range(-2, REPEATS):
        began = time.perf_counter()
        tokens = action(model)
        if repeat >= 0:
            times.append(time.perf_counter() - began)
    median = statistics.median(times)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    speed = {
        "tokens_per_s": round(tokens / median, 1),
        "seconds_median": round(median, 4),
        "seconds_least": round(min(times), 4),
    }
    about = {"bench": name, "compiled": compiled}
    print(json.dumps(about | speed | {"parameters": parameters} | versions))


if __name__ == "__main__":
    if sys.argv[1:] not in (["train"], ["train", "--compile"], ["sample"]):
        sys.exit("usage: python bench/transformers_tiny.py train [--compile] | sample")
    main(sys.argv[1], "--compile" in sys.argv)
