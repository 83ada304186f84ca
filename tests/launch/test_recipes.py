"""The recipes of docs/reinforce.md run in the words that are written there, for a few steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla import COMPILE_FLAGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reinforce.md").read_text()
RECIPES = re.findall(r"^### (.*?)\n.*?```bash\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
# Enough that every part runs; the model that results can do nothing.
FEW = {
    "finetune": "--config.train.steps=2 --config.data.batch_size=2",
    "reinforce": "--config.train.steps=2 --config.reinforce.group_size=2",
    "evaluate": "--config.evaluate.problems=4 --config.evaluate.samples=2",
}


def test_there_are_three():
    assert len(RECIPES) == 3


@pytest.mark.slow
@pytest.mark.command
@pytest.mark.parametrize("title, commands", RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_runs_as_it_is_written(title, commands, tmp_path):
    for command, fewer in FEW.items():
        commands = re.sub(rf"(-m launch\.{command} .*)", rf"\1 {fewer}", commands)
    script = f"set -e\npython() {{ '{sys.executable}' \"$@\"; }}\n{commands}"
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_FLAGS}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = tmp_path.glob("runs/*/rl")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((run / "evaluation.json").read_text())["problems"] == 4
