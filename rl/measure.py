"""The metrics of a step of reinforcement, under the names that metrics.jsonl has."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rl.pay import Rewards
from rl.request import Counts
from rl.rewards import metric_name
from rl.rollouts import Group


def over_updates(measured: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Returns the metrics of a rollout from those of its updates: means over them.

    The gap between the log-probs of trainer and sampler is that of the first update, when both have
    the same parameters. Counters and the learning rate are those after the last; of ratios the
    largest counts. "effective_sample_size" is that of the importance weights, as a share of the
    tokens: (mean r)^2 / mean r^2.
    """
    means = {
        name: jnp.mean(jnp.stack([values[name] for values in measured]), axis=0)
        for name in measured[0]
    }
    if len(measured) == 1:
        means = dict(measured[0])
    before = {name: measured[0][name] for name in means if name.startswith("sampler/")}
    last = ("learning_rate", "skipped", "skipped_in_row")
    after = {
        name: measured[-1][name]
        for name in means
        if name.rpartition("/")[2] in last and not name.startswith("sampler/")
    }
    largest = {
        name: jnp.max(jnp.stack([values[name] for values in measured]))
        for name in ("ratio_max",)
        if name in means
    }
    means |= before | after | largest
    if "ratio_squared" in means:
        square = means.pop("ratio_squared")
        means["effective_sample_size"] = jnp.square(means["ratio"]) / jnp.maximum(square, 1e-30)
    return means


def observe(groups: Sequence[Group], counts: Counts) -> dict[str, float | np.number]:
    """Returns the metrics of what was sampled, "tokens" among them, be it learnt from or not.

    Where MTP modules draft, those of the drafts: the share that was taken, and tokens a pass.
    """
    drafts = {}
    if counts.drafted:
        drafts["sampler/drafts_accepted"] = counts.accepted / counts.drafted
        drafts["sampler/tokens_per_pass"] = (counts.passes + counts.accepted) / counts.passes
    completions = [each for group in groups for each in group.completions]
    rewards = Rewards.joined([group.rewards for group in groups])
    lengths_B = np.asarray([completion.length for completion in completions])
    return {
        "reward": rewards.total_PG.mean(),
        **{metric_name(name): mean for name, mean in rewards.means().items()},
        "completion_length": lengths_B.mean(),
        "truncated": np.mean([completion.truncated for completion in completions]),
        "zero_variance_groups": np.mean(np.ptp(rewards.total_PG, axis=1) == 0),
        "tokens": lengths_B.sum(),
        **drafts,
    }


def timed(values: Mapping[str, Any], started: float, sampled: float) -> dict[str, Array]:
    """Waits for the values of a step, and adds how long sampling and updating took, in seconds.

    Args:
      started, sampled: `time.monotonic()` at the beginning of the step and when it had sampled.
    """
    arrays = {name: jnp.asarray(value) for name, value in values.items()}
    jax.block_until_ready(arrays)
    return arrays | {
        "sample_seconds": jnp.asarray(sampled - started),
        "update_seconds": jnp.asarray(time.monotonic() - sampled),
    }
