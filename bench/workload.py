"""What the scripts share: a config read as the commands read it, a state, random batches, and how
time is taken.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np
from ml_collections import ConfigDict

from experiment.config_files import get_config
from experiment.schema import Config, parse
from train.state import count_parameters

CONFIG = "configs/tiny_dsv3.py"
REPEATS = 10


def workload(**changes) -> Config:
    """configs/tiny_dsv3.py, with `section__field=value` changed."""
    config: ConfigDict = get_config(CONFIG)
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return parse(config)


def random_tokens(seed: int, rows: int, columns: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, columns), dtype=np.int32)


def seconds(action: Callable[[int], object], repeats: int = REPEATS) -> list[float]:
    """Time of each of so many calls, after two that compile and warm up. `action` gets the number
    of the call.
    """
    times = []
    for repeat in range(-2, repeats):
        began = time.perf_counter()
        jax.block_until_ready(action(repeat))
        if repeat >= 0:
            times.append(time.perf_counter() - began)
    return times


def print_result(name: str, config: Config, times: list[float], tokens: int, **more) -> None:
    """One JSON line: tokens_per_s by the median, and what is needed to compare it."""
    total, active = count_parameters(config.model)
    median = statistics.median(times)
    about = {
        "parameters": total,
        "active": active,
        "dtype": config.model.dtype,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
    speed = {
        "tokens_per_s": round(tokens / median, 1),
        "seconds_median": round(median, 4),
        "seconds_least": round(min(times), 4),
        "repeats": len(times),
    }
    print(json.dumps({"bench": name} | speed | more | about | {"jax": version("jax")}))
