"""The quickstart at its smallest, as a person runs it: one command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla import COMPILE_FLAGS

ROOT = Path(__file__).parents[2]
PRETRAIN = {
    "loss_first",
    "loss_last",
    "tokens",
    "tokens_per_s",
    "middle_loss_with_suffix",
    "middle_loss_without_suffix",
}
REINFORCE = {
    "algorithm",
    "pass@1_before",
    "pass@1_after",
    "pass@8_before",
    "pass@8_after",
    "problems",
    "samples",
}


def launch(command: str, *flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": COMPILE_FLAGS,
    }  # one device, and as in conftest little optimised
    return subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.command
def test_every_phase_runs_and_its_models_write(tmp_path):
    done = launch("quickstart", "--config=tests/launch/tiny_quickstart.py", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pretrain"].keys() >= PRETRAIN
    assert {"validation_lm", "validation_mtp_1"} <= summary["pretrain"].keys()
    assert summary["indexer"].keys() >= {"recall", "recall_random", "topk", "context"}
    assert summary["reinforce"].keys() >= REINFORCE
    assert summary.keys() >= {"seconds", "devices", "versions"}
    assert 0 < summary["indexer"]["recall_random"] < 1
    page = (tmp_path / "report.html").read_text()
    for shown in (
        " -m launch.quickstart --config=tests/launch/tiny_quickstart.py",
        "config fields differ from configs/base.py",
        "How it fills a gap",
        "What it writes",
        "What it wrote as it learned",
        "Learning rate",
        "GiB",
        "seed",
    ):
        assert shown in page
    assert "Left out" not in page and len(page) < 3_000_000
    for phase in ("pretrain", "warmup", "sparse", "finetune", "reinforce"):
        assert (tmp_path / phase / "checkpoints" / "2").is_dir()
        assert (tmp_path / phase / "metrics.jsonl").exists()
        assert list((tmp_path / phase / "tensorboard").iterdir())

    sampled = launch(
        "sample",
        f"--workdir={tmp_path / 'reinforce'}",
        "--chat=A zoo has 7 birds. 3 leave. How many birds now?",
    )
    assert sampled.returncode == 0, sampled.stderr[-2000:]
    infilled = launch(
        "sample",
        f"--workdir={tmp_path / 'sparse'}",
        "--infill",
        "--prefix=def f(x):\\n",
        "--suffix=\\n    return y\\n",
    )
    assert infilled.returncode == 0, infilled.stderr[-2000:]
    assert infilled.stdout.rstrip().endswith("return y")
    assert "def f(x):" in infilled.stdout
