"""What does it cost to learn from samples of eight steps before? Three arms, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/lag_sweep.py --command=reinforce --workdir=runs/lag \
        --show=reinforce.reward_last --show=reinforce.validation_pass_at_1 \
        --show=reinforce.entropy_last

CISPO weighs a token by the ratio to the policy that sampled it, REINFORCE with group-centred
advantages takes an old sample for one of its own. ScaleRL (arXiv 2510.13786, section 3) has a lag
of eight.

Little with the correction, and most of what is learnt without it: pass@1 begins at 0.32
(2026-12-01, jax 0.10.2, three minutes a run on a core). Means over three seeds, with 95 %
intervals, of held-out problems and of rewards in the last tenth of the steps, of which 0.1 is for
the form:

    lag                     pass@1                      reward
    0    CISPO              0.794 (0.697 to 0.891)      0.90 (0.81 to 0.99)
    1    CISPO              0.769 (0.686 to 0.851)      0.91 (0.80 to 1.03)
    8    CISPO              0.721 (0.618 to 0.825)      0.87 (0.82 to 0.92)
    8    uncorrected        0.454 (0.293 to 0.616)      0.66 (0.39 to 0.93)

Without a lag all ratios are 1, and what is uncorrected here is the Dr.GRPO of
configs/length_sweep.py: 0.800 (0.718 to 0.882).
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
