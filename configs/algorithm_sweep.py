"""How do five algorithms do on the same problems? Each with its own defaults, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/algorithm_sweep.py --command=reinforce \
        --workdir=runs/algorithms --show=reinforce.reward_last \
        --show=reinforce.validation_pass_at_1 --show=reinforce.validation_pass_at_8 \
        --show=reinforce.entropy_last

A step has four updates, so that ratios and clips have work to do.

Its runs are not in yet.
"""

from collections.abc import Callable
from typing import Any

from configs import sums

SEEDS = (0, 1, 2)


def get_config() -> Any:
    """Returns the config that the sweep changes."""
    c = sums.reinforce()
    c.reinforce.minibatches = 4
    return c


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """How do PPO, REINFORCE++, GSPO and CISPO do beside GRPO?"""
    for algorithm in ("grpo", "ppo", "reinforce_pp", "gspo", "cispo"):
        for seed in SEEDS:
            add({"reinforce.algorithm": algorithm, "seed": seed})
