"""The whole road once, on a laptop: learning to copy, pretraining with FIM, the sparse indexer,
cold start, reinforcement, and what each came to.

    python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/quickstart python -m
    launch.quickstart --config=configs/quickstart.py --workdir=runs/seed1 --seed=1 python -m
    launch.quickstart --config=configs/quickstart.py --workdir=runs/longer
    --config.pretrain.train.steps=5000

It only composes launch.pretrain, launch.finetune, launch.reinforce and launch.evaluate; the same
command again goes on where it stopped. Writes summary.json and report.html; each stage has its own
directory with checkpoints, metrics.jsonl and TensorBoard events.
"""

import time
from pathlib import Path

from ml_collections import ConfigDict

from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import Source
from experiment.schema import Config, parse
from launch import evaluate, finetune, pretrain, reinforce
from launch.report import print_table, write_report
from report.summary import road_summary, write_summary

COMMANDS = dict.fromkeys(("copying", "pretrain", "warmup", "sparse"), pretrain.run) | {
    "finetune": finetune.run,
    "reinforce": reinforce.run,
}
# directory: (whose checkpoint, which evaluations not)
EVALUATIONS = {
    "sparse_evaluation": ("sparse", "problems"),
    "before": ("finetune", "infill_documents"),
    "after": ("reinforce", "infill_documents"),
}


def run(config: Source, workdir: Path, seed: int) -> None:
    began = time.time()
    written = config.read()
    if set(written) != set(COMMANDS):
        raise UserError(
            f"{config.path}: get_config() must return a config for each of {', '.join(COMMANDS)}; it has {', '.join(written)}"
        )
    stages, previous = {}, ""
    for name in COMMANDS:
        written[name].seed = seed
        written[name].init_from = previous
        stages[name] = parse_stage(name, written[name])
        previous = str(workdir / name)

    for name, train in COMMANDS.items():
        print(f"\n{name}", flush=True)
        if not train(stages[name], workdir / name):
            print("stopped; the same command goes on from here")
            return
    evaluations = {}
    for name, (stage, left_out) in EVALUATIONS.items():
        print(f"\n{name}", flush=True)
        evaluations[name] = evaluate.run(
            evaluation_config(written, stage, left_out, workdir), workdir / name
        )
    summary = road_summary(stages, workdir, evaluations, seconds=time.time() - began)
    write_summary(workdir, summary)
    print()
    print_table(summary)
    print(f"wrote {write_report(workdir)}")


def parse_stage(name: str, written: ConfigDict) -> Config:
    try:
        return parse(written)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def evaluation_config(written: ConfigDict, stage: str, left_out: str, workdir: Path) -> Config:
    """The stage's config with its own result to start from. Held-out text is that of pretraining:
    the later stages' data has no code to infill.
    """
    config = written[stage].copy_and_resolve_references()
    config.init_from = str(workdir / stage)
    config.evaluate = written.reinforce.evaluate.copy_and_resolve_references()
    config.evaluate[left_out] = 0
    config.sampling = written.reinforce.sampling.copy_and_resolve_references()
    return parse_stage(stage, config)


if __name__ == "__main__":
    command(run, config="source", flags={"seed": Flag(0, "of every stage")})
