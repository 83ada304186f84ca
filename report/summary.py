"""What a run came to, in numbers: summary.json of a stage, and of the whole road."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from errors import UserError
from experiment.schema import Config
from train.metrics import read_metrics

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_whole(path: Path, text: str) -> None:
    """The file, whole or not at all. Raises UserError if it cannot be written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as failure:
        raise UserError(f"{path}: cannot write: {failure.strerror}") from failure


def write_summary(workdir: Path, numbers: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(workdir / "summary.json", json.dumps(numbers, indent=2) + "\n")


def stage_summary(config: Config, workdir: Path, stage: str) -> dict[str, float]:
    """First and last of what the metrics say, tokens seen and the median speed of a training run.

    loss is the language model's, in nats per token. Reinforcement learning has its reward, length,
    entropy and log-prob gap, over the first and last tenth of the steps.
    """
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["stage"] == stage]
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return {}
    numbers = {"steps": trained[-1]["step"]}
    speeds = sorted(line["tokens_per_s"] for line in trained if line.get("tokens_per_s"))
    if speeds:
        numbers["tokens_per_s"] = speeds[len(speeds) // 2]
    if stage == "reinforce":
        tenth = max(len(trained) // 10, 1)
        for name in ("reward", "completion_length", "entropy", "logprob_gap_max"):
            for when, part in (("first", trained[:tenth]), ("last", trained[-tenth:])):
                numbers[f"{name}_{when}"] = sum(line[name] for line in part) / tenth
        return numbers
    numbers |= {
        "loss_first": trained[0]["lm"],
        "loss_last": trained[-1]["lm"],
        "tokens": trained[-1]["step"] * config.data.batch_size * config.data.seq_len,
    }
    validated = [line for line in lines if "validation_lm" in line]
    return numbers | (
        {name: value for name, value in validated[-1].items() if name.startswith("validation_")}
        if validated
        else {}
    )


def road_summary(
    stages: Mapping[str, Config],
    workdir: Path,
    evaluations: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """summary.json of the quickstart."""
    numbers = {
        name: stage_summary(config, workdir / name, _metrics_name(name))
        for name, config in stages.items()
    }
    sparse, before, after = (
        evaluations["sparse_evaluation"],
        evaluations["before"],
        evaluations["after"],
    )
    numbers["pretrain"] |= {
        name: value
        for name, value in sparse.items()
        if name.startswith(("middle_loss", "infilling"))
    }
    indexer = stages["sparse"].model.indexer
    recall = {"recall": sparse["indexer_recall"], "recall_random": sparse["indexer_recall_random"]}
    numbers["indexer"] = recall | {"topk": indexer.topk, "context": stages["sparse"].data.seq_len}
    passes = {
        when: {row["k"]: row for row in result["pass_at_k"]}
        for when, result in (("before", before), ("after", after))
    }
    numbers["reinforce"] = {"algorithm": stages["reinforce"].reinforce.algorithm} | numbers[
        "reinforce"
    ]
    for k in passes["before"]:
        for when, rows in passes.items():
            numbers["reinforce"][f"pass@{k}_{when}"] = rows[k]["mean"]
    numbers["reinforce"] |= {
        f"pass_at_k_{when}": list(rows.values()) for when, rows in passes.items()
    }
    numbers["reinforce"] |= {
        "problems": before["problems"],
        "samples": before["samples"],
        "format_before": before["format"],
        "format_after": after["format"],
    }
    devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return numbers | {
        "seed": stages["pretrain"].seed,
        "seconds": seconds,
        "devices": devices,
        "versions": versions,
    }


def _metrics_name(stage: str) -> str:
    """Under which name a stage's command writes its metrics: copying, warm-up and sparse training
    are launch.pretrain's.
    """
    return "pretrain" if stage in ("copying", "warmup", "sparse") else stage
