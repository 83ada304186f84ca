"""Do wrong answers grow longer under GRPO than under Dr.GRPO? Two rows, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/length_sweep.py --command=reinforce \
        --workdir=runs/length --show=reinforce.unsolved_length_first \
        --show=reinforce.unsolved_length_last --show=reinforce.validation_pass_at_1

GRPO divides what a completion adds to the loss by its length, so that a long wrong one costs less a
token (Dr.GRPO, arXiv 2503.20783, section 3.1); Dr.GRPO divides by a constant.

Its runs are not in yet.
"""

from collections.abc import Callable
from typing import Any

from configs import sums

SEEDS = (0, 1, 2)


def get_config() -> Any:
    """Returns the config that the sweep changes."""
    return sums.reinforce()


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Do wrong answers grow longer under GRPO than under Dr.GRPO?"""
    for algorithm in ("grpo", "dr_grpo"):
        for seed in SEEDS:
            add({"reinforce.algorithm": algorithm, "seed": seed})
