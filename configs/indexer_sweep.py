"""Should the indexer learn in reinforcement? Six short runs of the quickstart's model.

    make quickstart
    python -m launch.sweep --config=configs/indexer_sweep.py --command=reinforce \
        --workdir=runs/indexers

The runs begin from the quickstart's fine-tuned model, whose indexer has been warmed up, and are the
quickstart's last phase: Dr.GRPO for 24 steps on problems of arithmetic, of which no two steps have
the same. So each takes as long as that phase does (34 s where README.md's figures come from), and
all six some four minutes on such a machine. The table's reward_last is a mean over the last two
steps. In report.html are the rewards, the indexer's divergence and the norm of its gradient.

Seen on 2026-11-30, jax 0.10.2, over the last six of the 24 steps, seeds 0, 1 and 2:

    indexer   reward                   indexer_kl               indexer_grad_norm
    trained   1.004, 0.929, 0.970      0.226, 0.220, 0.227      0.187, 0.184, 0.185
    frozen    1.004, 0.931, 0.970      0.239, 0.232, 0.237      0

So at this size and length there is no difference in reward: attention moves so little in 24 steps
that a frozen indexer lags by 0.01 nats of divergence, and a trained one gains nothing by it.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart

SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
    """Returns the config that the sweep changes."""
    return quickstart.reinforce()


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Does a policy gain from an indexer that learns with it, or from one that stays?"""
    for indexer in ("trained", "frozen"):
        for seed in SEEDS:
            add({"reinforce.indexer": indexer, "seed": seed})
