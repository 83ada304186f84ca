"""How do five algorithms do on the same problems? Each with its own defaults, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/algorithm_sweep.py --command=reinforce \
        --workdir=runs/algorithms --show=reinforce.reward_last \
        --show=reinforce.validation_pass_at_1 --show=reinforce.validation_pass_at_8 \
        --show=reinforce.entropy_last

A step has four updates, so that ratios and clips have work to do.

All learn, from 0.32, and these runs cannot tell them apart (2026-12-01, jax 0.10.2, 3 to 4 minutes
a run on a core, PPO with its critic 7). Means over three seeds, with 95 % intervals; the
entropy is that of the last tenth of the steps, in nats a token:

                    pass@1                    pass@8                    entropy
    grpo            0.765 (0.690 to 0.839)    0.940 (0.918 to 0.963)    0.035 (0.031 to 0.039)
    ppo             0.708 (0.565 to 0.851)    0.898 (0.840 to 0.957)    0.032 (0.022 to 0.043)
    reinforce_pp    0.786 (0.704 to 0.868)    0.951 (0.910 to 0.991)    0.028 (0.021 to 0.035)
    gspo            0.787 (0.763 to 0.812)    0.932 (0.888 to 0.977)    0.033 (0.026 to 0.040)
    cispo           0.711 (0.627 to 0.795)    0.896 (0.873 to 0.918)    0.032 (0.017 to 0.048)

Of pass@8 the intervals of GRPO and CISPO do not overlap; of so many pairs one may by chance.
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
