"""Problems in groups of one difficulty: by what a problem says of itself, or by a pass rate."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.tasks.problem import Problem

FIELDS = ("difficulty", "level")  # of a problem's own data, the first that it has
MOST_GROUPS = 8  # of single values; of more values there are QUANTILES groups
QUANTILES = 4
RATE_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Group(NamedTuple):
    """Problems of one difficulty: what it is, and their places."""

    name: str
    places: np.ndarray


def difficulty_of(problem: Problem) -> str | float | None:
    """Returns how hard a problem says it is: its field, or its number of steps; None of neither."""
    for name in FIELDS:
        value = problem.data.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return value
    return problem.ops or None


def by_own_difficulty(difficulties: Sequence[str | float | None]) -> list[Group]:
    """Returns groups of problems by their own difficulty, the easiest number first.

    Texts are groups by name. Numbers are groups by value, or where there are more than MOST_GROUPS
    values, quarters of the problems. Problems without a difficulty are in none.
    """
    known = [place for place, value in enumerate(difficulties) if value is not None]
    if any(isinstance(difficulties[place], str) for place in known):
        names = {place: str(difficulties[place]) for place in known}
        return [
            Group(name, np.array([place for place in known if names[place] == name]))
            for name in sorted(set(names.values()))
        ]
    places = np.array(known, int)
    values = np.array([float(difficulties[place] or 0) for place in known])
    single = np.unique(values)
    if len(single) <= MOST_GROUPS:
        return [Group(f"{value:g}", places[values == value]) for value in single]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES + 1)))
    which = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [
        Group(f"{edges[i]:g} to {edges[i + 1]:g}", places[which == i])
        for i in range(len(edges) - 1)
        if np.any(which == i)
    ]


def by_pass_rate(rates: np.ndarray) -> list[Group]:
    """Returns groups of problems by how often they were solved, from never to always.

    The rates must not be of the completions that are compared within a group: a problem that was
    unlucky in them would be called hard, and then seem to be solved more often by any other run.
    """
    rates = np.asarray(rates, float)
    groups = [("never", rates == 0)]
    for low, high in itertools.pairwise(RATE_EDGES):
        above = (rates > low) & ((rates < 1) if high == 1 else (rates <= high))
        groups.append((f"{low:.0%} to {high:.0%}", above))
    groups.append(("always", rates == 1))
    return [Group(name, np.flatnonzero(which)) for name, which in groups if np.any(which)]
