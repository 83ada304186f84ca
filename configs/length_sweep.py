"""Do wrong answers grow longer under GRPO than under Dr.GRPO? Two rows, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/length_sweep.py --command=reinforce \
        --workdir=runs/length --show=reinforce.unsolved_length_first \
        --show=reinforce.unsolved_length_last --show=reinforce.validation_pass_at_1

GRPO divides what a completion adds to the loss by its length, so that a long wrong one costs less a
token (Dr.GRPO, arXiv 2503.20783, section 3.1); Dr.GRPO divides by a constant.

No, or by less than these runs can show (2026-12-01, jax 0.10.2, three minutes a run on a core).
Means over three seeds, with 95 % intervals: the length of completions that fail, in the first and
the last tenth of the steps, and pass@1 of held-out problems.

                tokens, first          last                     pass@1
    grpo        9.55 (9.30 to 9.80)    29.2 (26.9 to 31.4)      0.781 (0.708 to 0.854)
    dr_grpo     9.48 (9.04 to 9.92)    28.6 (25.4 to 31.8)      0.800 (0.718 to 0.882)

Under both, wrong answers become as long as right ones: what grows is working it out, which pays.
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
