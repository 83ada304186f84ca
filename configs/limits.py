r"""Does reinforcement solve what its base cannot, or only more often? pass@k to k = 256.

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

Here nearly so (2026-12-01, jax 0.10.2, two minutes an evaluation): reinforcement solves much more
with one try and, from eleven on, as much or less: at 256 both solve all, or it lacks one. 64
held-out problems, 256 completions each, with 95 % intervals over problems; of reinforcement seed 0,
and pass@k of seeds 1 and 2 behind it:

    k       base                      seed 0   difference                   seeds 1, 2
    1       0.344 (0.306 to 0.379)    0.809    +0.465 (+0.414 to +0.519)    0.782, 0.808
    8       0.916 (0.886 to 0.941)    0.950    +0.033 (-0.009 to +0.071)    0.947, 0.951
    32      0.997 (0.993 to 1.000)    0.969    -0.028 (-0.068 to -0.001)    0.976, 0.974
    256     1.000                     0.984    -0.016 (-0.047 to +0.000)    1.000, 1.000

The curves cross at k = 11.0 (7.5 to 26.1); with the other seeds at 11.1 and 11.5, in 97 and 96 % of
resamples. Answers of the reinforced model are likelier under the base than the base's own, by 0.19
(0.17 to 0.21) nats a token: they lie in the low part of its perplexity.
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
