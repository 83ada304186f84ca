"""Is dynamic sampling worth its tokens? DAPO that samples on, and without, three seeds.

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.sweep --config=configs/resample_sweep.py --command=reinforce \
        --workdir=runs/resample --show=reinforce.validation_pass_at_1 \
        --show=reinforce.validation_pass_at_8 --show=reinforce.sampled_tokens

A group whose completions all earn the same teaches nothing. `replaced` samples others in its place
(DAPO, arXiv 2503.14476, section 3.2), which costs their tokens. So beside as many steps without it
are as many tokens: 66 steps.

Its runs are not in yet.
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
