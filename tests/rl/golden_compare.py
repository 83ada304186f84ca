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
    "counts",
)
# These are compared where tokens are learnt from.
AT_TOKENS = ("advantages", "returns", "weights", "mask", "values")
# Float32 against float64: of the largest number of a result, and beside it. A log-prob of size 2 is
# rounded by 1e-7, a ratio by as much of itself, and a mean of fifty terms by a few such roundings.
# The largest difference is a quarter of this.
RELATIVE, ABSOLUTE = 2e-6, 2e-7


def compared(case: Case, ours: Ours, found: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Returns the largest difference over what is allowed, and the results beyond it."""
    worst, beyond = 0.0, []
    mask_BT = {**fields_of(case), **ours.fields}["mask"]
    for name in RESULTS:
        expected = case.get(name)
        if expected is None or name in ours.skip:
            continue
        got = np.asarray(found[name], np.float64)
        expected = np.asarray(expected, np.float64)
        if expected.ndim and len(expected) > len(got):
            expected = expected[case["call"]["rows"]]
        if expected.ndim and expected.shape != got.shape:
            expected = expected.reshape(len(expected), -1)
        kept = mask_BT if name in AT_TOKENS else 1.0
        if name == "weights" and "mask" in case and "mask" not in ours.skip:
            kept = kept * np.asarray(case["mask"])
        gap = np.abs(got - expected) * kept
        largest = np.max(np.abs(expected * kept), initial=0.0)
        over = float(np.max(gap / (ABSOLUTE + RELATIVE * largest), initial=0.0))
        if not over <= 1:
            beyond.append(f"{name}: {over:.3g} gap {np.max(gap):.3g} of {largest:.3g}")
        worst = max(worst, over)
    return worst, beyond
