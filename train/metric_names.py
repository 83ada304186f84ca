"""The names of metrics in metrics.jsonl, where runs of before wrote others."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "logprob_gap_max": "sampler/logprob_gap_max",
    "logprob_gap_mean": "sampler/logprob_gap_mean",
}
"""The old name of a metric -> the present one."""


def by_present_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics.jsonl with its metrics by the names they have today."""
    return {RENAMED.get(name, name): value for name, value in line.items()}
