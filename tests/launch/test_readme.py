"""The commands of README.md run in the words that stand there, one after the other, made small.

The quickstart runs before them, as make would run it, and what it leaves is looked at.

Those that only a tool outside Python understands are left to the tests of what they call: make,
and the planner, whose compiler has an environment of its own (tests/compile).
"""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny_checkpoint import write_checkpoint, write_tokenizer
from tests.xla import COMPILE_FLAGS

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python -m launch.")]
OTHERS = ("make ", ".venv-compile/bin/python -m launch.plan ")

MODEL = [
    f"--config.model.{field}"
    for field in (
        "hidden_size=16",
        "num_hidden_layers=2",
        "intermediate_size=32",
        "mla.num_attention_heads=2",
        "mla.q_lora_rank=8",
        "mla.kv_lora_rank=8",
        "mla.qk_nope_head_dim=8",
        "mla.qk_rope_head_dim=4",
        "mla.v_head_dim=8",
        "indexer.n_heads=2",
        "indexer.head_dim=8",
        "indexer.rope_head_dim=4",
        "indexer.topk=8",
        "moe.num_experts=4",
        "moe.intermediate_size=16",
    )
]
STEPS = ["train.steps=1", "train.eval_batches=1", "data.seq_len=128", "data.batch_size=2"]
ROLLOUTS = ["reinforce.prompts_per_step=2", "reinforce.group_size=2", "sampling.max_new_tokens=8"]
FEW = ["evaluate.problems=2", "evaluate.samples=2", "evaluate.infill_documents=2"]
SMALLER = {  # a command -> overrides of its config
    "pretrain": STEPS,
    "finetune": STEPS,
    "reinforce": ["train.steps=1", "sampling.max_prompt_tokens=160", *ROLLOUTS],
    "evaluate": [*FEW, "evaluate.text_batches=1", "evaluate.bootstrap=10"],
    "sample": ["sampling.max_new_tokens=4"],
}

# What the quickstart measures, and what its page shows.
PRETRAIN = {
    "loss_first",
    "loss_last",
    "tokens",
    "tokens_per_s",
    "middle_loss_with_suffix",
    "middle_loss_without_suffix",
    "validation_lm",
    "validation_mtp_1",
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
SHOWN = (
    " -m tests.launch.paste commands.json",  # the command, as the process was started
    "config fields differ from configs/base.py",
    "How it fills a gap",
    "What it writes",
    "What it wrote as it learned",
    "Learning rate",
    "GiB",
    "seed",
)


def smaller(line: str) -> list[str]:
    """Returns the words of a command, with overrides that make it small behind them."""
    words = shlex.split(line)
    name = words[2].removeprefix("launch.")
    fresh = "--config=configs/base.py" in words and "hf:DIR" not in line
    if "--compare" in line:
        return words  # which has no config
    return [
        *words,
        *(MODEL if fresh else []),
        *(f"--config.{override}" for override in SMALLER.get(name, [])),
    ]


def test_every_line_is_known():
    """A new command of the README is run here, or named in OTHERS."""
    assert [line for line in LINES if line not in COMMANDS and not line.startswith(OTHERS)] == []
    assert len(COMMANDS) > 15


@pytest.fixture(scope="module")
def pasted(tmp_path_factory) -> Path:
    """A directory in which all commands ran, the quickstart first, which others read."""
    directory = tmp_path_factory.mktemp("readme")
    write_files(directory)
    quickstart = "python -m launch.quickstart --config=tests/launch/tiny_quickstart.py"
    lines = [f"{quickstart} --workdir=runs/quickstart", *COMMANDS]
    sweeps = [line for line in lines if "launch.sweep" in line]  # six processes: test_sweep.py
    commands = [smaller(line) for line in lines if line not in sweeps]
    (directory / "commands.json").write_text(json.dumps(commands))
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_FLAGS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.paste", "commands.json"],
        cwd=directory,
        env=os.environ | environment,  # one device
        capture_output=True,
        text=True,
        check=False,
    )
    begun = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert done.returncode == 0, f"{begun[-1]}\n{done.stderr[-2000:]}"
    assert len(begun) == len(commands)
    (directory / "stdout").write_text(done.stdout)
    return directory


@pytest.mark.command
def test_every_command_runs_as_it_is_written(pasted):
    for written in ("runs/rl/summary.json", "scores.npz", "OUT/model.safetensors"):
        assert (pasted / written).exists(), written
    said = (pasted / "stdout").read_text()
    _, _, infilled = said.partition("launch.sample --workdir=runs/quickstart/sparse")
    assert "def add(a, b):" in infilled and "return c" in infilled


@pytest.mark.command
def test_the_quickstart_leaves_numbers_and_a_page(pasted):
    """Every phase at its smallest."""
    run = pasted / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["pretrain"].keys() >= PRETRAIN
    assert summary["indexer"].keys() >= {"recall", "recall_random", "topk", "context"}
    assert summary["reinforce"].keys() >= REINFORCE
    assert summary.keys() >= {"seconds", "devices", "versions"}
    assert 0 < summary["indexer"]["recall_random"] < 1
    page = (run / "report.html").read_text()
    for shown in SHOWN:
        assert shown in page, shown
    assert "Left out" not in page and len(page) < 3_000_000
    for phase in ("pretrain", "warmup", "sparse", "finetune", "reinforce"):
        assert (run / phase / "checkpoints" / "2").is_dir()
        assert (run / phase / "metrics.jsonl").exists()
        assert list((run / phase / "tensorboard").iterdir())


def write_files(directory: Path) -> None:
    """Writes what the README's commands read: texts, conversations, and DIR, a checkpoint."""
    (directory / "configs").symlink_to(ROOT / "configs")
    (directory / "tests").symlink_to(ROOT / "tests")
    for name in ("src", "docs", "notes"):
        (directory / name).mkdir()
    for number in range(40):
        text = f"def add_{number}(a, b):\n    return a + b + {number}\n\n" * 8
        (directory / "src" / f"{number}.py").write_text(text)
    (directory / "notes" / "one.txt").write_text("Adding is easy.\n")
    lines = [json.dumps({"text": f"Number {number} is a good one. " * 20}) for number in range(60)]
    with gzip.open(directory / "docs" / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chats = (json.dumps({"messages": turns}) + "\n" for _ in range(40))
    (directory / "chats.jsonl").write_text("".join(chats))
    (directory / "rows.json").write_text('{"input_ids": [[1, 2, 3]]}')
    model = tiny.model_config(
        canon_kernel_size=0, vocab_size=288, mla={"gate": "none"}, mtp_input="normed"
    )
    write_tokenizer(write_checkpoint(directory / "DIR", model, eos_token_id=257))
