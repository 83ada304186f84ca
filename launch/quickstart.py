r"""Runs every phase once, on a laptop, and evaluates what came of it.

The phases are pretraining with FIM, the sparse indexer's warm-up and sparse training, a cold start
on conversations, and reinforcement.

    python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/seed1 --seed=1
    python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/longer \
        --config.pretrain.train.steps=3000

It composes what launch.pretrain, launch.finetune, launch.reinforce and launch.evaluate run; the
same command again goes on where it stopped. Writes summary.json and report.html; each phase has its
own directory with checkpoints, metrics.jsonl and TensorBoard events.
"""

import time
from pathlib import Path
from typing import Any

from errors import UserError
from experiment import runs
from experiment.command_line import Flag, command
from experiment.config_files import ConfigSource
from experiment.reporting import write_report
from experiment.schema import Config, parse
from experiment.summary import quickstart_summary, write_summary
from report.table import print_table

# Phases in order; each starts from the checkpoint of the one before.
PHASES = {
    "pretrain": runs.pretrain,
    "warmup": runs.pretrain,
    "sparse": runs.pretrain,
    "finetune": runs.finetune,
    "reinforce": runs.reinforce,
}
# directory: (the phase whose checkpoint is evaluated, the part of the evaluation that is left out)
EVALUATIONS = {
    "sparse_evaluation": ("sparse", "problems"),
    "before": ("finetune", "infill_documents"),
    "after": ("reinforce", "infill_documents"),
}


def run(config: ConfigSource, workdir: Path, seed: int) -> bool:
    """Runs all phases and evaluations, and writes what they came to.

    Returns whether all is done, and not stopped before.
    """
    began = time.time()
    written: Any = config.read()  # a ConfigDict for each phase
    if set(written) != set(PHASES):
        raise UserError(
            f"{config.path}: get_config() must return a config for each of {', '.join(PHASES)}; "
            f"it has {', '.join(written)}"
        )
    phases = phase_configs(written, workdir, seed)
    for name, train in PHASES.items():
        print(f"\n{name}", flush=True)
        if not train(phases[name], workdir / name):
            return False
    evaluations = {}
    for name, (phase, left_out) in EVALUATIONS.items():
        print(f"\n{name}", flush=True)
        evaluations[name] = runs.evaluate(
            evaluation_config(written, phase, left_out, workdir), workdir / name
        )
    summary = quickstart_summary(phases, workdir, evaluations, seconds=time.time() - began)
    write_summary(workdir, summary)
    print()
    print_table(summary)
    print(f"wrote {write_report(workdir)}")
    return True


def phase_configs(written: Any, workdir: Path, seed: int) -> dict[str, Config]:
    """Gives each phase its seed and the phase before it to start from, in `written` too."""
    phases, previous = {}, ""
    for name in PHASES:
        written[name].seed = seed
        written[name].init_from = previous
        phases[name] = parse_phase(name, written[name])
        previous = str(workdir / name)
    return phases


def parse_phase(name: str, written: Any) -> Config:
    """Validates the config of a phase, whose name its errors begin with."""
    try:
        return parse(written)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def evaluation_config(written: Any, phase: str, left_out: str, workdir: Path) -> Config:
    """Returns the phase's config with its own result to start from.

    Held-out text is that of pretraining: the later phases' data has no code to infill.
    """
    config = written[phase].copy_and_resolve_references()
    config.init_from = str(workdir / phase)
    config.evaluate = written.reinforce.evaluate.copy_and_resolve_references()
    config.evaluate[left_out] = 0
    config.sampling = written.reinforce.sampling.copy_and_resolve_references()
    return parse_phase(phase, config)


if __name__ == "__main__":
    command(run, config="source", flags={"seed": Flag(0, "of every phase")})
