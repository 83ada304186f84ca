"""Does a higher upper bound of the clip keep the entropy up? DAPO with and without, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/clip_sweep.py --command=reinforce --workdir=runs/clip \
        --show=reinforce.entropy_first --show=reinforce.entropy_last \
        --show=reinforce.validation_pass_at_1 --show=reinforce.validation_pass_at_8

Clip-higher (DAPO, arXiv 2503.14476, section 3.1) lets unlikely tokens gain more before they are
clipped. A clip binds where a policy has left the one that sampled: a step has 8 updates here. At
four times the learning rate, which clips more, the policy is lost under either bound.

Not that these runs could show (2026-12-01, jax 0.10.2, five minutes a run on a core): the mean
entropy at the end is higher, and varies more than that from seed to seed. Means over three seeds,
with 95 % intervals; the entropy is of the first and the last tenth of the steps, in nats a token:

    high    entropy, first            last                      pass@1                 pass@8
    0.2     0.143 (0.126 to 0.161)    0.031 (0.025 to 0.038)    0.72 (0.57 to 0.86)    0.90
    0.28    0.141 (0.126 to 0.157)    0.043 (0.011 to 0.074)    0.64 (0.53 to 0.75)    0.82

The intervals of pass@8 are 0.77 to 1.03 and 0.74 to 0.90. Few tokens are clipped from above: 0.41
and 0.34 % on average.
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
