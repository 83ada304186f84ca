"""Does a higher upper bound of the clip keep the entropy up? DAPO with and without, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/clip_sweep.py --command=reinforce --workdir=runs/clip \
        --show=reinforce.entropy_first --show=reinforce.entropy_last \
        --show=reinforce.validation_pass_at_1 --show=reinforce.validation_pass_at_8

Clip-higher (DAPO, arXiv 2503.14476, section 3.1) lets unlikely tokens gain more before they are
clipped. A clip binds where a policy has left the one that sampled: a step has 8 updates here. At
four times the learning rate, which clips more, the policy is lost under either bound.

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
    c.reinforce.epochs = 2
    return c


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Does a higher upper bound of the clip keep the entropy up?"""
    for high in (0.2, 0.28):
        for seed in SEEDS:
            add({"reinforce.algorithm": f"dapo?high={high}", "seed": seed})
