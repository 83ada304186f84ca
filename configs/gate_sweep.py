"""Does the attention gate help at a higher learning rate? Six short runs of a small model.

python -m launch.sweep --config=configs/gate_sweep.py --command=pretrain --workdir=runs/gates
--parallel=1
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.pretrain()
    c.init_from = ""  # what `copying` leaves has a gate per element
    c.train.steps = 100
    return c


def sweep(add) -> None:
    """Does the attention gate help at a higher learning rate?"""
    for learning_rate in (2e-3, 8e-3):
        for gate in ("none", "head", "element"):
            add({"train.learning_rate": learning_rate, "model.mla.gate": gate})
