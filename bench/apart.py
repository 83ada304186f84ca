"""Measures a step whose sampler has a device of its own, beside one that takes turns on one.

    python -m bench.apart

Both learn two steps late from completions of configs/sums.py's shape, by random weights and a
reward for the share of letters. Devices are pretended, of one core each, so the machine needs two
idle cores: apart, a step should take as long as the longer half, and in turns as both together. One
JSON line has medians over the steps behind the tenth, of the step's seconds and of each half's, and
the ratio of the first to their sum.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.workload import machine
from errors import UserError
from experiment.command_line import command

REWARD = '''
def letters(text, problem):
    """The share of letters."""
    return sum(c.isalpha() for c in text) / max(1, len(text))
'''
STEPS, WARM = 30, 10
CONFIG = {
    "init_from": "",
    "train.steps": STEPS,
    "train.eval_every": 0,
    "train.save_every": STEPS,
    "reinforce.lag": 2,
    "reinforce.algorithm": "cispo",
    "reinforce.canary_tolerance": 0.0,
}
PARTS = {"step": "step_time", "sampling": "timing_s/gen", "learning": "timing_s/update_actor"}
DEVICES = (
    "--xla_force_host_platform_device_count={} --xla_cpu_multi_thread_eigen=false "
    "intra_op_parallelism_threads=1"
)


def run(where: Path, apart: bool) -> dict[str, float]:
    """Runs launch.reinforce in a directory and returns the medians; UserError if it fails."""
    (where / "letters.py").write_text(REWARD)
    changes = CONFIG | {
        "reinforce.rewards": f"{{'{where}/letters.py:letters': 1.0}}",
        "reinforce.sampler_devices": int(apart),
    }
    command = [sys.executable, "-m", "launch.reinforce", "--config=configs/sums.py:reinforce"]
    command += [f"--workdir={where / 'run'}"]
    command += [f"--config.{field}={value}" for field, value in changes.items()]
    flags = DEVICES.format(1 + apart)
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"launch.reinforce: exit code {done.returncode}; {done.stderr[-500:]!r}")
    lines = (where / "run" / "metrics.jsonl").read_text().splitlines()
    taken = [line for line in map(json.loads, lines) if "step_time" in line][WARM:]
    medians = {
        name: round(statistics.median(line[key] for line in taken), 3)
        for name, key in PARTS.items()
    }
    both = medians["sampling"] + medians["learning"]
    return medians | {"ratio": round(medians["step"] / both, 3)}


def main() -> None:
    """Measures both and prints the line."""
    found = {}
    for apart in (False, True):
        with tempfile.TemporaryDirectory() as where:
            found["apart" if apart else "turns"] = run(Path(where), apart)
    speedup = round(found["turns"]["step"] / found["apart"]["step"], 3)
    print(json.dumps({"bench": "apart"} | found | {"speedup": speedup} | machine()))


if __name__ == "__main__":
    command(main, config="none", workdir=False)
