"""Gives the benchmark scripts their config, random tokens and the timing of calls."""

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np

from experiment.config_files import ConfigSource
from experiment.schema import Config, parse
from model.config import ModelConfig
from rl.config import SamplingConfig
from rl.request import Prompt, keys_of
from train.state import count_parameters

CONFIG = "configs/tiny_dsv3.py"
REPEATS = 10


def tiny_dsv3_config(*overrides: str) -> Config:
    """Reads configs/tiny_dsv3.py with FIELD=VALUE overrides, such as "data.seq_len=64"."""
    return parse(
        ConfigSource(CONFIG, tuple(f"--config.{override}" for override in overrides)).read()
    )


def random_tokens(seed: int, rows: int, columns: int, vocab_size: int) -> np.ndarray:
    """Draws tokens [rows, columns], int32, uniform over the vocabulary."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, columns), dtype=np.int32)


def random_prompts(
    seed: int, count: int, model: ModelConfig, sampling: SamplingConfig, group_size: int = 1
) -> list[Prompt]:
    """Draws prompts as long as they may be, without stop ids, for completions as long."""
    tokens_PT = random_tokens(seed, count, sampling.max_prompt_tokens, model.vocab_size)
    keys_PG2 = keys_of(jax.random.key(seed), range(count), group_size)
    return [
        Prompt(row.tolist(), keys_G2, sampling.max_new_tokens, group=number)
        for number, (row, keys_G2) in enumerate(zip(tokens_PT, keys_PG2, strict=True))
    ]


def seconds(action: Callable[[int], object], repeats: int = REPEATS) -> list[float]:
    """Times `repeats` calls of `action`, after two more that compile and warm up.

    Args:
      action: gets the number of the call, from -2 on; what it returns is waited for.
      repeats: calls that are timed.
    """
    times = []
    for repeat in range(-2, repeats):
        began = time.perf_counter()
        jax.block_until_ready(action(repeat))
        if repeat >= 0:
            times.append(time.perf_counter() - began)
    return times


def machine() -> dict[str, str | int | None]:
    """Returns what a line of figures says of where they were measured."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": version("jax"),
    }


def print_result(name: str, config: Config, times: list[float], tokens: int, **more: float) -> None:
    """Prints one JSON line: tokens_per_s by the median, and what is needed to compare it.

    Args:
      name: the script's.
      config: what it ran.
      times: seconds of each repeat.
      tokens: how many tokens each repeat took or made.
      **more: further figures of the line.
    """
    total, active = count_parameters(config.model)
    median = statistics.median(times)
    about = {
        "parameters": total,
        "active": active,
        "dtype": config.model.dtype,
    }
    speed = {
        "tokens_per_s": round(tokens / median, 1),
        "seconds_median": round(median, 4),
        "seconds_least": round(min(times), 4),
        "repeats": len(times),
    }
    print(json.dumps({"bench": name} | speed | more | about | machine()))
