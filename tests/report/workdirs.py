"""Plausible workdirs of every kind of data: noisy, a NaN among them, markup in samples."""

import json
import math
import random
from pathlib import Path

from train.metrics import Metrics


def pass_at_k(means: dict[int, float]) -> list[dict[str, float]]:
    return [{"k": k, "mean": m, "low": m - 0.05, "high": m + 0.05} for k, m in means.items()]


SUMMARY = {
    "pretrain": {
        "loss_first": 6.239,
        "loss_last": 2.412,
        "tokens": 1_228_800,
        "tokens_per_s": 9_204.7,
        "middle_loss_with_suffix": 2.18,
        "middle_loss_without_suffix": 2.74,
        "middle_loss_empty_suffix": 2.69,
        "infilling": {
            "text:*.py": {
                "suffix_saves_over_without_suffix": {"mean": 0.56, "low": 0.41, "high": 0.7},
                "suffix_saves_over_empty_suffix": {"mean": 0.51, "low": 0.37, "high": 0.66},
            }
        },
    },
    "indexer": {"recall": 0.912, "recall_random": 0.264, "topk": 64, "context": 256},
    "reinforce": {
        "algorithm": "dr_grpo",
        "pass@1_before": 0.213,
        "pass@1_after": 0.671,
        "pass@8_before": 0.604,
        "pass@8_after": 0.893,
        "problems": 128,
        "samples": 8,
        "pass_at_k_before": pass_at_k({1: 0.213, 2: 0.34, 4: 0.48, 8: 0.604}),
        "pass_at_k_after": pass_at_k({1: 0.671, 2: 0.76, 4: 0.84, 8: 0.893}),
    },
    "seconds": 843.2,
    "devices": "2 CPU cores",
    "versions": {"jax": "0.12.0.1", "flax": "0.12.12", "python": "3.13"},
}


def write_phase(workdir: Path, phase: str, steps: int, values) -> None:
    with Metrics(workdir / phase, phase) as metrics:
        for step in range(1, steps + 1):
            line = values(step, step / steps)
            if step == steps:
                line["expert_load"] = [
                    [random.gauss(1, 0.5 if phase == "pretrain" else 0.25) % 3 for _ in range(8)]
                    for _ in range(5)
                ]
            metrics.write(step, line)


def write_quickstart(workdir: Path) -> None:
    random.seed(0)

    def language(first, last, **more):
        def values(step, done):
            lm = last + (first - last) * math.exp(-5 * done) + random.gauss(0, 0.06)
            line = {
                "lm": lm,
                "loss": lm + 0.5,
                "mtp_1": lm + 0.4,
                "grad_norm": 1 + random.random(),
                "learning_rate": 1e-3 * (1 - done),
                "expert_load_max": 1.1 + 1.5 * math.exp(-6 * done),
            }
            if step % 40 == 0:
                line["validation_lm"] = lm + 0.08
            return line | {name: value(done) for name, value in more.items()}

        return values

    def reward(step, done):
        solved = 0.2 + 0.55 / (1 + math.exp(6 - 12 * done)) + random.gauss(0, 0.04)
        return {
            "reward": solved + 0.09,
            "rewards/answer/mean": solved,
            "rewards/format/mean": 0.09,
            "completions/mean_length": 34 - 10 * done + random.gauss(0, 1),
            "entropy": 0.3 + 0.5 * math.exp(-3 * done),
            "clip_ratio/region_mean": 0.01 + 0.02 * random.random(),
            "kl": math.nan,
            "frac_reward_zero_std": 0.2 + 0.4 * done,
            "indexer_grad_norm": 0.2 - 0.1 * done,
            "sampling/sampling_logp_difference/max": 2e-5 * (1 + random.random()),
            "sampling/sampling_logp_difference/mean": 4e-7 * (1 + random.random()),
        }

    recall = {
        "indexer_recall": lambda done: 0.3 + 0.6 * (1 - math.exp(-4 * done)),
        "indexer_recall_random": lambda done: 0.26 + random.gauss(0, 0.01),
    }
    write_phase(workdir, "pretrain", 300, language(6.2, 2.4))
    write_phase(
        workdir,
        "warmup",
        80,
        language(2.4, 2.4, indexer_kl=lambda done: 1.4 * math.exp(-3 * done) + 0.1, **recall),
    )
    write_phase(
        workdir,
        "sparse",
        120,
        language(
            2.5,
            2.35,
            indexer_kl=lambda done: 0.2 - 0.1 * done,
            indexer_recall=lambda done: 0.9 + 0.01 * done,
        ),
    )
    write_phase(workdir, "finetune", 150, language(3.1, 0.4))
    write_phase(workdir, "reinforce", 100, reward)
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    for when, right in (("before", 0.2), ("after", 0.8)):
        (workdir / when).mkdir()
        with (workdir / when / "samples.jsonl").open("w") as file:
            for problem in range(8):
                a, b = 13 * problem % 40, 7 * problem % 30
                for _ in range(2):
                    good = random.random() < right
                    result = a + b if good else a - b
                    doubt = "" if good else ", or is it less < more?"
                    thought = f"<think>{a} + {b}: {a} and {b} make {result}{doubt}</think>"
                    cut = right <= 0.5 and problem % 3 == 0
                    completion = thought[:-8] if cut else f"{thought}<answer>{result}</answer>"
                    prompt = f"<|user|>What is {a} + {b}?<|assistant|>"
                    sample = {
                        "prompt": prompt,
                        "completion": completion,
                        "reward": 1.1 if good else 0.1,
                        "answer": str(a + b),
                    }
                    file.write(json.dumps(sample) + "\n")
