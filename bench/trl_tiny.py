"""Measures the step of bench.reinforce in TRL on torch, to compare with.

    pip install torch transformers trl
    python bench/trl_tiny.py

Install them in a separate environment. It prints one JSON line like bench.reinforce's, of
GRPOTrainer on the model of transformers_tiny.py: 8 prompts of 32 tokens x 8 completions of 64, all
of full length, sampled by generate; one AdamW step; float32, no reference model, and no gradient
checkpointing, which is TRL's default and would compute the forward pass twice.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time

# It also takes this directory off the path, so that what is imported next does not take the files
# here for packages.
from transformers_tiny import SIZES

try:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
except ImportError as missing:
    sys.exit(f"{missing.name} is needed: pip install torch transformers trl")

REPEATS, WARM_UP = 10, 2
PROMPTS, GROUP, PROMPT, NEW, VOCAB = 8, 8, 32, 64, SIZES["vocab_size"]


class StepTimes(transformers.TrainerCallback):
    """Keeps the seconds of each step, generation included."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Stops the clock."""
        self.times.append(time.perf_counter() - self.began)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Makes a tokenizer whose tokens are the words t0 to t511."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", padding_side="left"
    )


def reward(completion_ids, **_) -> list[float]:
    """Rewards each completion with its mean token id over the size of the vocabulary."""
    return [statistics.mean(ids) / VOCAB for ids in completion_ids]


def main() -> None:
    """Trains a few steps and prints the JSON line."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(f"t{rng.randrange(2, VOCAB)}" for _ in range(PROMPT))}
        for _ in range(PROMPTS * (REPEATS + WARM_UP))
    ]
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES))
    step_times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW},
            loss_type="grpo",
            beta=0.0,
            learning_rate=1e-3,
            max_steps=REPEATS + WARM_UP,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[step_times],
        )
        trainer.train()
    times = step_times.times[WARM_UP:]
    median = statistics.median(times)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    speed = {
        "tokens_per_s": round(PROMPTS * GROUP * NEW / median, 1),
        "seconds_median": round(median, 4),
        "seconds_least": round(min(times), 4),
    }
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    print(json.dumps({"bench": "reinforce"} | speed | {"parameters": parameters} | versions))


if __name__ == "__main__":
    main()
