"""Do DeepSeek-V3.2's stabilisers hold a policy that its sampler drifts away from? Three seeds.

    make quickstart
    python -m launch.sweep --config=configs/drift_sweep.py --command=reinforce \
        --workdir=runs/drift --show=reinforce.validation_pass_at_1

The drift is deliberate: the quickstart's model, of experts and selected keys, samples in bfloat16,
four steps late, and learns with eight updates a step at five times its learning rate. The row
`deepseek_v32` has the four of arXiv 2512.02556, section 3.1: an unbiased KL, a mask of wrong
completions that drifted, and the sampler's experts, keys and sampling mask in the trainer. The last
is tried by sampling from a nucleus: a nucleus without its mask is refused, so that whoever has none
samples from all ids. A run of 40 steps takes two minutes and a half on one core.
"""

from collections.abc import Callable
from typing import Any

from configs import quickstart

SEEDS = (0, 1, 2)
WITHOUT = "keep_routing=false&keep_selection=false"
ARMS = {
    "none": f"deepseek_v32?off_policy=0&{WITHOUT}",
    "off-policy mask": f"deepseek_v32?{WITHOUT}",
    "experts and keys": "deepseek_v32?off_policy=0",
    "unbiased KL": f"deepseek_v32?off_policy=0&kl=0.01&{WITHOUT}",
    "KL of GRPO": f"deepseek_v32?off_policy=0&kl=0.01&kl_estimator=k3&{WITHOUT}",
    "the first three": "deepseek_v32?kl=0.01",
    "all four": "deepseek_v32?kl=0.01",
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
    c.train.eval_every = 40
    c.evaluate.samples = 8
    return c


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Do DeepSeek-V3.2's stabilisers hold a policy that its sampler drifts away from?"""
    for arm, algorithm in ARMS.items():
        for seed in SEEDS:
            top_p = 0.95 if arm == "all four" else 1.0
            add({"reinforce.algorithm": algorithm, "sampling.top_p": top_p, "seed": seed})
