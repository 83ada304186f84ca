"""Is dynamic sampling worth its tokens? DAPO that samples on, and without, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/resample_sweep.py --command=reinforce \
        --workdir=runs/resample --show=reinforce.validation_pass_at_1 \
        --show=reinforce.validation_pass_at_8 --show=reinforce.sampled_tokens

A group whose completions all earn the same teaches nothing. `replaced` samples others in its place
(DAPO, arXiv 2503.14476, section 3.2), which costs their tokens. So beside as many steps without it
are as many tokens: 66 steps.

Not here: more steps of the kind that wastes some come as far (2026-12-01, jax 0.10.2, four minutes
a run on a core). Means over three seeds, with 95 % intervals, of held-out problems, and of tokens
sampled in the run:

    groups      steps    pass@1                    pass@8                    thousand tokens
    kept        40       0.794 (0.697 to 0.891)    0.943 (0.894 to 0.992)    131 (128 to 135)
    kept        66       0.839 (0.807 to 0.871)    0.953                     227 (220 to 234)
    replaced    40       0.829 (0.805 to 0.852)    0.961 (0.942 to 0.980)    218 (194 to 242)

What it saves is updates: 66 steps update on 1.65 times as many completions.
"""

from collections.abc import Callable
from typing import Any

from configs import sums

SEEDS = (0, 1, 2)


def get_config() -> Any:
    """Returns the config that the sweep changes."""
    return sums.reinforce()


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Is dynamic sampling worth its tokens?"""
    dapo = {"reinforce.algorithm": "dapo"}
    as_many_tokens = {"train.steps": 66, "train.eval_every": 66}
    for seed in SEEDS:
        add({**dapo, "reinforce.zero_variance": "kept", "seed": seed})
        add({**dapo, "reinforce.zero_variance": "kept", **as_many_tokens, "seed": seed})
        add({**dapo, "reinforce.zero_variance": "replaced", "seed": seed})
