"""The metrics of a step of reinforcement, under the names that metrics.jsonl has.

docs/metrics.md lists them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from rl.pay import Rewards
from rl.request import Counts
from rl.rewards import metric_name
from rl.rollouts import Group
from rl.token_metrics import FRESH_SHARE, IMPORTANCE, LOGP_DIFFERENCE, SQUARES

Values = dict[str, np.ndarray]

# Between trainer and sampler, before anything is learnt.
_OF_FIRST = (f"{LOGP_DIFFERENCE}/", f"{IMPORTANCE}/", "rollout_corr/", FRESH_SHARE)
_OF_LAST = ("learning_rate", "skipped", "skipped_in_row")


def over_updates(measured: Sequence[Mapping[str, Array]]) -> Values:
    """Returns the metrics of a step from those of its updates: means over them, on the host.

    What compares the trainer with the sampler is that of the first update, before which nothing has
    been learnt. Counters and the learning rate are those after the last; of what is an extreme, the
    most extreme counts.

    The difference of log-probs is left out where no token of the first update was sampled with the
    weights that the step began with.
    """
    updates = jax.device_get(list(measured))
    values = {}
    for name in updates[0]:
        found = np.stack([np.asarray(update[name], np.float32) for update in updates])
        if name.startswith(_OF_FIRST):
            values[name] = found[0]
        elif name.rpartition("/")[2] in _OF_LAST:
            values[name] = np.asarray(updates[-1][name])
        elif name.endswith(("/max", "/min")):
            values[name] = found.max(axis=0) if name.endswith("/max") else found.min(axis=0)
        else:
            values[name] = found.mean(axis=0)
    for mean, size in SQUARES.items():
        if size in values:
            values[size] = np.square(values[mean]) / np.maximum(values[size], 1e-30)
    if not values.pop(FRESH_SHARE, 1):
        values = {name: x for name, x in values.items() if not name.startswith(LOGP_DIFFERENCE)}
    return values


def observe(groups: Sequence[Group], counts: Counts) -> dict[str, float | np.number]:
    """Returns the metrics of what was sampled, "tokens" among them, be it learnt from or not.

    Where MTP modules draft, those of the drafts: the share that was taken, and tokens a pass.
    """
    drafts = {}
    if counts.drafted:
        drafts["sampling/drafts_accepted"] = counts.accepted / counts.drafted
        drafts["sampling/tokens_per_pass"] = (counts.passes + counts.accepted) / counts.passes
    completions = [each for group in groups for each in group.completions]
    rewards = Rewards.joined([group.rewards for group in groups])
    by_name = {}
    for name, paid_PG in zip(rewards.names, rewards.paid_MPG, strict=True):
        by_name[f"{metric_name(name)}/mean"] = paid_PG.mean()
        by_name[f"{metric_name(name)}/std"] = spread(paid_PG)
    lengths_B = np.asarray([completion.length for completion in completions])
    truncated_B = np.asarray([completion.truncated for completion in completions])
    return {
        "reward": rewards.total_PG.mean(),
        "reward_std": spread(rewards.total_PG),
        "frac_reward_zero_std": np.mean(np.ptp(rewards.total_PG, axis=1) == 0),
        **by_name,
        **of_lengths("length", lengths_B),
        **of_lengths("terminated_length", lengths_B[~truncated_B]),
        "completions/clipped_ratio": truncated_B.mean(),
        "tokens": lengths_B.sum(),
        **drafts,
    }


def of_lengths(what: str, lengths_B: np.ndarray) -> dict[str, float | np.number]:
    """Returns "completions/mean_WHAT", and the least and largest: 0 where there is none."""
    found = lengths_B if len(lengths_B) else np.zeros(1)
    extremes = {"min": found.min(), "mean": found.mean(), "max": found.max()}
    return {f"completions/{name}_{what}": value for name, value in extremes.items()}


def lengths_by_outcome(
    groups: Sequence[Group], solves: Callable[[Rewards], np.ndarray]
) -> dict[str, float]:
    """Returns "completions/mean_solved_length" and "completions/mean_unsolved_length".

    They are of the completions that solve their problem and of the others; without any it is left
    out.

    Args:
      solves: rewards of a group -> which of its completions do, bool [G].
    """
    lengths_B = np.asarray([each.length for group in groups for each in group.completions])
    solved_B = np.concatenate([solves(group.rewards) for group in groups])
    parts = {"solved": lengths_B[solved_B], "unsolved": lengths_B[~solved_B]}
    return {
        f"completions/mean_{name}_length": float(part.mean())
        for name, part in parts.items()
        if len(part)
    }


def spread(paid: np.ndarray) -> float:
    """Returns the standard deviation over all completions of a step, by n - 1; 0 of one alone."""
    return float(np.std(paid, ddof=1)) if paid.size > 1 else 0.0


def speeds(seconds: Mapping[str, Any], sampled: int, learnt: int) -> dict[str, float]:
    """Returns tokens a second of both sides.

    Args:
      seconds: of `rl.clock.Parts.collect`, among others.
      sampled: tokens that were sampled meanwhile.
      learnt: tokens that updates went over, those of the prompts among them, each as often as it
        has epochs.
    """
    sides = (("gen", sampled, ("gen",)), ("update", learnt, ("update_actor", "update_critic")))
    found = {}
    for side, tokens, parts in sides:
        spent = sum(seconds.get(f"timing_s/{part}", 0.0) for part in parts)
        found[f"perf/{side}_tokens_per_s"] = tokens / spent if spent else 0.0
    return found


def as_arrays(values: Mapping[str, float | np.number | np.ndarray]) -> Values:
    """Returns the metrics of a step as arrays, which `train.monitor.StepLog` takes."""
    return {name: np.asarray(value) for name, value in values.items()}
