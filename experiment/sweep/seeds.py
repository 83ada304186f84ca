"""What a sweep says of runs that differ in their seed alone: means, with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiment.sweep.runs import SweepRun

SEED = "seed"


class OverSeeds(NamedTuple):
    """A result of runs that differ in their seed alone.

    mean: over the seeds.
    low, high: the 95 % interval of that mean, by Student's t over seeds.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "OverSeeds":
        """Returns what two or more values come to."""
        from scipy import stats  # takes a second to import, which no other command needs

        mean = float(np.mean(values))
        wide = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)
        half = float(wide) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


class Seeds(NamedTuple):
    """Runs that differ in their seed alone.

    changes: what they have in common, field -> value.
    count: how many they are.
    results: name of a number -> what it comes to, of those that all of them have.
    """

    changes: Mapping[str, Any]
    count: int
    results: Mapping[str, OverSeeds]


def over_seeds(runs: Sequence[SweepRun], results: Mapping[str, Mapping[str, float]]) -> list[Seeds]:
    """Returns the runs of a sweep by what they have in common but for the seed, in order.

    Left out are runs that have not ended well, and those of which there is one seed.
    """
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        if SEED in run.changes and run.exit_code() == 0:
            groups.setdefault(str(_common(run)), []).append(run)
    found = []
    for group in groups.values():
        if len(group) < 2:
            continue
        numbers = [results[run.name] for run in group]
        shared = [name for name in numbers[0] if all(name in each for each in numbers)]
        means = {name: OverSeeds.of([each[name] for each in numbers]) for name in shared}
        found.append(Seeds(_common(group[0]), len(group), means))
    return found


def _common(run: SweepRun) -> dict[str, Any]:
    return {field: value for field, value in run.changes.items() if field != SEED}
