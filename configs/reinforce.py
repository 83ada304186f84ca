"""Reinforcement learning's own defaults, for any model that has learnt to answer.

    python -m launch.reinforce --config=configs/reinforce.py --workdir=runs/rl \
        --config.init_from=runs/chat

Whatever moves a policy but its rewards is off: with those of pretraining (configs/base.py) a policy
whose rewards were all equal fell from 0.37 to 0.12 of pass@1 in 20 steps, nearly all of it by the
balance loss, of whose tiny gradient Adam makes steps of full size. The learning rate is for models
of a million parameters; those of billions want 1e-6. docs/reinforce.md has three recipes.
"""

from typing import Any

from configs import base


def get_config() -> Any:
    """Returns the config."""
    c = base.get_config()
    c.train.stage = "sparse"  # with sampling.attention = "dense" as well: "dense"
    c.train.steps = 200
    c.train.learning_rate = 1e-4
    c.train.warmup_steps = 5
    c.train.final_ratio = 1.0  # constant: a run may go on for as long as it gains
    c.train.beta2 = 0.99
    c.train.weight_decay = 0.0
    # Routing and selection stay as pretraining left them.
    c.train.balance_weight = 0.0
    c.train.router_bias_rate = 0.0
    c.train.indexer_weight = 0.0
    c.train.mtp_weight = 0.0
    c.train.log_every = 1
    c.train.save_every = 50
    return c
