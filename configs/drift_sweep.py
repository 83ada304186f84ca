"""Do DeepSeek-V3.2's stabilisers hold a policy that its sampler drifts away from? Three seeds.

    make quickstart
    python -m launch.sweep --config=configs/drift_sweep.py --command=reinforce \
        --workdir=runs/drift --show=reinforce.reward_first --show=reinforce.reward_last \
        --show=reinforce.logp_difference_max_last --show=reinforce.entropy_last

The drift is deliberate: the quickstart's model, of experts and selected keys, samples in bfloat16,
four steps late, and learns with eight updates a step at five times its learning rate. The row
`deepseek_v32` has the four of arXiv 2512.02556, section 3.1: an unbiased KL, a mask of wrong
completions that drifted, and the sampler's experts, keys and sampling mask in the trainer. The
others lack one of them, or all that can be left out: without its mask the nucleus is refused, so
they sample from all ids.

Its runs are not in yet.
"""

from collections.abc import Callable
from typing import Any

from configs import quickstart

SEEDS = (0, 1, 2)
ALL = "deepseek_v32?kl=0.01"
ARMS = {
    "all": {"reinforce.algorithm": ALL, "sampling.top_p": 0.95},
    "no off-policy mask": {"reinforce.algorithm": f"{ALL}&off_policy=0", "sampling.top_p": 0.95},
    "biased KL": {"reinforce.algorithm": f"{ALL}&kl_estimator=k3", "sampling.top_p": 0.95},
    "own experts and keys": {
        "reinforce.algorithm": f"{ALL}&keep_routing=false&keep_selection=false",
        "sampling.top_p": 0.95,
    },
    "none": {
        "reinforce.algorithm": f"{ALL}&off_policy=0&kl_estimator=k3&keep_routing=false"
        "&keep_selection=false",
        "sampling.top_p": 1.0,
    },
}


def get_config() -> Any:
    """Returns the config that the sweep changes."""
    c: Any = quickstart.reinforce()
    c.sampling.dtype = "bfloat16"
    c.reinforce.lag = 4
    c.reinforce.minibatches = 4
    c.reinforce.epochs = 2
    c.train.learning_rate = 1e-3
    c.train.steps = 40
    return c


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Do DeepSeek-V3.2's stabilisers hold a policy that its sampler drifts away from?"""
    for arm in ARMS.values():
        for seed in SEEDS:
            add({**arm, "seed": seed})
