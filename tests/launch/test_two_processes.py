"""A run over two processes, as on two hosts, is the run over two devices of one.

Parameters, rollouts and held-out text lie on both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ports import free_address
from tests.xla import COMPILE_FLAGS

ROOT = Path(__file__).parents[2]
# Random bytes are never a right answer: a reward that some completions earn and some do not, so
# that there is a gradient.
SCRIPT = """
import dataclasses
import rl.pay
from experiment import runs
from experiment.command_line import command

def reward(text, problem, weights):
    length = len(text.encode()) % 3 / 2
    return length, {"answer": length, "format": 0.0}

def run(config, workdir):
    rl.pay.total_reward = reward
    runs.pretrain(config, workdir / "pretrain")
    start = config.init_from or str(workdir / "pretrain")
    runs.reinforce(dataclasses.replace(config, init_from=start), workdir / "reinforce")
    start = str(workdir / "reinforce")
    runs.evaluate(dataclasses.replace(config, init_from=start), workdir / "evaluation")

command(run)
"""
CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.tokenizer.kind = "bytes"
    c.model.hidden_size, c.model.num_hidden_layers, c.model.intermediate_size = 16, 2, 32
    c.model.canon_kernel_size, c.model.initializer_range = 2, 0.2
    c.model.mla.update({"num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8})
    c.model.mla.update({"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8})
    c.model.indexer.update({"n_heads": 2, "head_dim": 8, "rope_head_dim": 4, "topk": 8})
    c.model.moe.update({"num_experts": 4, "intermediate_size": 16})
    c.data.sources, c.data.fim_sources = ("task:arithmetic?count=200",), ("task",)
    c.data.seq_len, c.data.batch_size = 128, 8
    c.mesh.data, c.mesh.fsdp = 1, 2  # parameters too are spread over the hosts
    c.train.update({"steps": 2, "warmup_steps": 1, "log_every": 1, "eval_batches": 1})
    c.train.stage = "sparse"
    c.sampling.update({"max_prompt_tokens": 160, "max_new_tokens": 8})
    c.reinforce.update({"prompts_per_step": 8, "group_size": 2, "minibatches": 2})
    c.evaluate.update({"problems": 8, "samples": 2, "infill_documents": 4, "bootstrap": 50})
    return c
"""


def start(workdir: Path, *flags: str, **environment: str) -> subprocess.Popen:
    config = workdir.parent / "two.py"
    config.write_text(CONFIG)
    words = [sys.executable, "-c", SCRIPT, f"--config={config}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_FLAGS} | environment
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(*processes: subprocess.Popen) -> None:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(
        output[-3000:] for output in outputs
    )


def reinforcement_metrics(workdir: Path) -> list[dict]:
    """Returns what reinforcement measured, without times."""
    lines = map(json.loads, (workdir / "reinforce" / "metrics.jsonl").read_text().splitlines())
    return [
        {
            name: value
            for name, value in line.items()
            if "second" not in name and name not in ("time", "tokens_per_s", "stage")
        }
        for line in lines
    ]


@pytest.mark.slow
def test_two_processes_are_two_devices(tmp_path):
    """From the same parameters; pretraining itself reads other documents in each process, so there
    it only has to end.
    """
    alone, hosts = tmp_path / "alone", tmp_path / "hosts"
    wait(start(alone, "--pretend_devices=2"))
    address = free_address()
    wait(
        *(
            start(
                hosts,
                f"--config.init_from={alone / 'pretrain'}",
                ATHANOR_DISTRIBUTED=f"{address},{process},2",
            )
            for process in range(2)
        )
    )

    found, expected = reinforcement_metrics(hosts), reinforcement_metrics(alone)
    assert [0 < line["reward"] < 1 and line["grad_norm"] > 0 for line in expected] == [True, True]
    for one, other in zip(found, expected, strict=True):
        for name in other:  # float32 sums in another order, over two updates
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
    found, expected = (
        json.loads((workdir / "evaluation" / "evaluation.json").read_text())
        for workdir in (hosts, alone)
    )
    assert expected["middle_loss_with_suffix"] > 0 and expected["indexer_recall"] > 0
    for name in ("middle_loss_with_suffix", "middle_loss_without_suffix", "completion_length"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    samples = [(workdir / "evaluation" / "samples.jsonl").read_text() for workdir in (hosts, alone)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 16
