r"""Pretrains with fill-in-the-middle, trains the sparse indexer, or goes on from another run.

    python -m launch.pretrain --config=configs/quickstart.py:pretrain --workdir=runs/mine
    python -m launch.pretrain --config=configs/base.py --workdir=runs/mine \
        --config.data.sources="('text:src/**/*.py',)" --config.train.steps=5000
    python -m launch.pretrain --config=configs/base.py --workdir=runs/indexer \
        --config.init_from=runs/mine --config.train.stage=warmup

The same command again goes on where the run stopped. SIGTERM or Ctrl-C saves and ends it.
"""

from pathlib import Path

from experiment import runs
from experiment.command_line import command
from experiment.schema import Config


def run(config: Config, workdir: Path) -> bool:
    """Returns whether all steps are done, and not stopped before the last."""
    return runs.pretrain(config, workdir)


if __name__ == "__main__":
    command(run)
