"""Does reinforcement solve what its base cannot, or only more often? pass@k to k = 256.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.reinforce --config=configs/sums.py:reinforce --workdir=runs/sums_rl
    python -m launch.evaluate --config=configs/limits.py --workdir=runs/limits/base \
        --config.init_from=runs/sums
    python -m launch.evaluate --config=configs/limits.py --workdir=runs/limits/rl \
        --config.init_from=runs/sums_rl
    python -m launch.evaluate --compare=runs/limits/base,runs/limits/rl
    python -m launch.evaluate --workdir=runs/limits/rl --perplexity_under=runs/limits/base

Yue et al. (arXiv 2504.13837) find that a base model, given enough tries, solves more problems than
the model that rewards made of it.

Its runs are not in yet.
"""

from typing import Any

from configs import sums


def get_config() -> Any:
    """Returns the config of an evaluation."""
    c = sums.reinforce()
    c.evaluate.problems = 64
    c.evaluate.samples = 256
    c.evaluate.text_batches = 0
    return c
