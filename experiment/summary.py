"""Writes the results of a run as numbers: summary.json of a phase, and of the whole quickstart."""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from errors import UserError
from experiment.run_record import devices, versions
from experiment.schema import Config
from files import read_json, write_json
from train.metrics import read_metrics

# What summary.json has of reinforcement -> the metric it is the mean of.
_SUMMARISED = {
    "reward": "reward",
    "completion_length": "completions/mean_length",
    "unsolved_length": "completions/mean_unsolved_length",
    "entropy": "entropy",
    "logp_difference_max": "sampling/sampling_logp_difference/max",
}


def write_summary(workdir: Path, numbers: Mapping[str, Any]) -> None:
    """Writes summary.json, on process 0 alone. Raises UserError if it cannot be written."""
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", numbers)


def phase_summary(config: Config, workdir: Path, phase: str) -> dict[str, float]:
    """Returns first and last values of a training run's metrics, its tokens and median speed.

    memory_gib is the most that any of the run's processes had of a device, or of the machine where
    devices do not tell.
    loss is the language model's, in nats per token; of pairs, what is minimised. Reinforcement
    learning has its reward, length, entropy and log-prob gap, over the first and last tenth of the
    steps, its last evaluation, and the tokens that were sampled in the steps that were logged.

    Args:
      phase: "pretrain", "finetune" or "reinforce", as metrics.jsonl has it under "stage".
    """
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["stage"] == phase]
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return {}
    recorded = _recorded_memory(workdir, phase)
    numbers = {"steps": trained[-1]["step"], "memory_gib": max(recorded, peak_memory_gib())}
    speeds = sorted(line["tokens_per_s"] for line in trained if line.get("tokens_per_s"))
    if speeds:
        numbers["tokens_per_s"] = speeds[len(speeds) // 2]
    if phase == "reinforce":
        return numbers | _rewards(trained) | _validated(lines)
    return (
        numbers
        | {
            "loss_first": trained[0].get("lm", trained[0]["loss"]),
            "loss_last": trained[-1].get("lm", trained[-1]["loss"]),
            "tokens": trained[-1]["step"] * config.data.batch_size * config.data.seq_len,
        }
        | _validated(lines)
    )


def _validated(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures of the last evaluation in the midst of a phase, if there is one."""
    evaluations = [line for line in lines if any(name.startswith("validation_") for name in line)]
    return {
        name: value
        for line in evaluations[-1:]
        for name, value in line.items()
        if name.startswith("validation_")
    }


def peak_memory_gib() -> float:
    """Returns the most memory that any local device has used so far, in GiB.

    Where devices do not tell, as a CPU does not, it is the most that this process had.
    """
    peaks = [
        statistics["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (statistics := device.memory_stats()) and "peak_bytes_in_use" in statistics
    ]
    if peaks:
        return round(max(peaks) / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, else KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def _recorded_memory(workdir: Path, phase: str) -> float:
    """Returns memory_gib of a phase as its summary.json has it, 0 without one."""
    try:
        return float(read_json(workdir / "summary.json")[phase]["memory_gib"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0.0


def _rewards(trained: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns means over the first and the last tenth of the steps."""
    tenth = max(len(trained) // 10, 1)
    numbers: dict[str, float] = {}
    for name, metric in _SUMMARISED.items():
        for when, lines in (("first", trained[:tenth]), ("last", trained[-tenth:])):
            found = [line[metric] for line in lines if metric in line]
            if found:
                numbers[f"{name}_{when}"] = sum(found) / len(found)
    return numbers | {"sampled_tokens": sum(line.get("tokens", 0) for line in trained)}


def quickstart_summary(
    phases: Mapping[str, Config],
    workdir: Path,
    evaluations: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Returns summary.json of the quickstart.

    Args:
      phases: the config of each phase, whose directory in `workdir` has the same name.
      evaluations: "sparse_evaluation", "before" and "after" reinforcement, each an evaluation.json.
      seconds: that all of it took.
    """
    numbers: dict[str, Any] = {
        name: phase_summary(config, workdir / name, _metrics_name(name))
        for name, config in phases.items()
    }
    for name in phases:  # the process that sums up had more in the end than each phase by itself
        if recorded := _recorded_memory(workdir / name, _metrics_name(name)):
            numbers[name]["memory_gib"] = recorded
    sparse = evaluations["sparse_evaluation"]
    numbers["pretrain"] |= {
        name: value
        for name, value in sparse.items()
        if name.startswith(("middle_loss", "infilling"))
    }
    numbers["indexer"] = {
        "recall": sparse["indexer_recall"],
        "recall_random": sparse["indexer_recall_random"],
        "topk": phases["sparse"].model.indexer.topk,
        "context": phases["sparse"].data.seq_len,
    }
    numbers["reinforce"] = (
        {"algorithm": phases["reinforce"].reinforce.algorithm}
        | numbers["reinforce"]
        | _before_and_after(evaluations["before"], evaluations["after"])
    )
    return numbers | {
        "seed": phases["pretrain"].seed,
        "seconds": seconds,
        "devices": devices(),
        "versions": versions(),
    }


def _before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Returns pass@k and format of the two evaluations side by side."""
    passes = {
        when: {row["k"]: row for row in result["pass_at_k"]}
        for when, result in (("before", before), ("after", after))
    }
    numbers: dict[str, Any] = {
        f"pass@{k}_{when}": rows[k]["mean"]
        for k in passes["before"]
        for when, rows in passes.items()
    }
    numbers |= {f"pass_at_k_{when}": list(rows.values()) for when, rows in passes.items()}
    return numbers | {
        "problems": before["problems"],
        "samples": before["samples"],
        "format_before": before["format"],
        "format_after": after["format"],
    }


def _metrics_name(phase: str) -> str:
    """Returns the name under which a phase's command writes its metrics.

    Warm-up and sparse training are pretraining.
    """
    return "pretrain" if phase in ("warmup", "sparse") else phase
