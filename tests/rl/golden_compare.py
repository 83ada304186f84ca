"""Compares ours with what a case has recorded."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.rl.golden_specs import Case, Ours, fields_of

RESULTS = (
    "loss",
    "gradient",
    "entropy_gradient",
    "advantages",
    "returns",
    "weights",
    "mask",
    "values",
    "rewards",
)
# Float32 against float64. A log-prob is rounded to 6e-8 of itself, a ratio by as much as its
# log-probs, and a mean of some fifty terms by a few of their roundings.
RELATIVE, ABSOLUTE = 2e-5, 2e-6


def compared(case: Case, ours: Ours, found: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Returns the largest difference over what is allowed, and the results beyond it."""
    worst, beyond = 0.0, []
    for name in RESULTS:
        expected = case.get(name)
        if expected is None or name in ours.skip:
            continue
        got = np.asarray(found[name], np.float64)
        expected = np.asarray(expected, np.float64)
        if expected.ndim and expected.shape != got.shape:
            expected = expected.reshape(len(expected), -1)
        kept = 1.0
        if name in ("advantages", "returns", "weights", "mask"):
            kept = fields_of(case)["mask"]
        if name == "values":
            kept = fields_of(case)["mask"]
        gap = np.abs(got - expected) * kept
        largest = np.max(np.abs(expected * kept), initial=0.0)
        over = float(np.max(gap / (ABSOLUTE + RELATIVE * largest), initial=0.0))
        if not over <= 1:
            beyond.append(f"{name}: {over:.3g} gap {np.max(gap):.3g} of {largest:.3g}")
        worst = max(worst, over)
    return worst, beyond
