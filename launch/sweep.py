r"""Runs every experiment of a config's sweep() and shows what came out, in a table and on a page.

    python -m launch.sweep --config=configs/x.py --command=pretrain --workdir=runs/sweep \
        --parallel=2
    python -m launch.sweep --config=configs/x.py --command=pretrain --workdir=runs/sweep \
        --show=pretrain.loss_last --config.train.steps=100

The config file says what to run: `def sweep(add)` with its question as docstring calls
`add({"train.learning_rate": 1e-3})` once a run. Each run is `python -m launch.COMMAND` with its own
directory below --workdir, log in sweep.log; results.csv has all results, and report.html the table
and the runs' curves. Give the same command again to go on: finished runs are kept. With
CUDA_VISIBLE_DEVICES set, the runs that go on at once share the devices out among them.
"""

import difflib
import importlib.util
from pathlib import Path

from errors import UserError
from experiment.command_line import command
from experiment.config_files import ConfigSource
from experiment.flags import Flag
from experiment.sweep.processes import execute
from experiment.sweep.runs import plan_runs
from experiment.sweep.table import write_table
from launch import COMMANDS

FLAGS = {
    "command": Flag(
        "",
        "what each run is: pretrain, finetune, reinforce, ..., "
        "or a module of your own with a dot in its name",
    ),
    "parallel": Flag(1, "runs at a time"),
    "show": Flag(
        (),
        "a column of the table, such as pretrain.loss_last; without it those that all runs have",
    ),
}


def run(
    config: ConfigSource, workdir: Path, *, command: str, parallel: int, show: tuple[str, ...]
) -> None:
    """Plans the runs of a sweep, runs what is not finished, and shows the results."""
    if not command:
        raise UserError("--command is missing: what each run is, such as --command=pretrain")
    if parallel < 1:
        raise UserError(f"--parallel={parallel}: must be positive")
    question, runs = plan_runs(config, module_of(command), workdir)
    execute(runs, parallel)
    write_table(question, runs, workdir, show)


def module_of(name: str) -> str:
    """Returns the module of a command, launch.NAME; a name with a dot is a module itself.

    Raises:
      UserError: there is no such command or module.
    """
    if name in COMMANDS:
        return f"launch.{name}"
    if "." in name and _exists(name):
        return name
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there is {', '.join(sorted(COMMANDS))}"
    raise UserError(f"--command={name}: no such command ({hint})")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    command(run, config="source", flags=FLAGS)
