"""Does the attention gate help at a higher learning rate? Six short runs of a small model.

python -m launch.sweep --config=configs/gate_sweep.py --command=pretrain --workdir=runs/gates
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config that the sweep changes."""
    c: Any = quickstart.pretrain()
    c.train.steps = 100
    return c


def sweep(add: Callable[[dict[str, Any]], None]) -> None:
    """Adds a run for each learning rate and gate."""
    for learning_rate in (2e-3, 8e-3):
        for gate in ("none", "head", "element"):
            add({"train.learning_rate": learning_rate, "model.mla.gate": gate})
