"""What does it cost to learn from samples of eight steps before? Three arms, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/lag_sweep.py --command=reinforce --workdir=runs/lag \
        --show=reinforce.reward_last --show=reinforce.validation_pass_at_1 \
        --show=reinforce.entropy_last

CISPO weighs a token by the ratio to the policy that sampled it, REINFORCE with group-centred
advantages takes an old sample for one of its own. ScaleRL (arXiv 2510.13786, section 3) has a lag
of eight.

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
    """What does a lag of one and of eight steps cost, with and without a correction?"""
    uncorrected = "dr_grpo?surrogate=log_likelihood"
    for lag, algorithm in ((0, "cispo"), (1, "cispo"), (8, "cispo"), (8, uncorrected)):
        for seed in SEEDS:
            add({"reinforce.lag": lag, "reinforce.algorithm": algorithm, "seed": seed})
