"""The names of metrics in metrics.jsonl, where runs of before wrote others."""

import functools
import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "reinforce": {
        "completion_length": "completions/mean_length",
        "truncated": "completions/clipped_ratio",
        "zero_variance_groups": "frac_reward_zero_std",
        "policy": "policy_loss",
        "clip_fraction": "clip_ratio/region_mean",
        "clip_fraction_low": "clip_ratio/low_mean",
        "clip_fraction_high": "clip_ratio/high_mean",
        "ratio": "ratio/mean",
        "ratio_max": "ratio/max",
        "effective_sample_size": "ratio/effective_sample_size",
        "kl_to_old": "ppo_kl",
        "logprob_gap_max": "sampling/sampling_logp_difference/max",
        "logprob_gap_mean": "sampling/sampling_logp_difference/mean",
        "sampler/logprob_gap_max": "sampling/sampling_logp_difference/max",
        "sampler/logprob_gap_mean": "sampling/sampling_logp_difference/mean",
        "sampler/staleness_mean": "sampling/staleness/mean",
        "sampler/staleness_max": "sampling/staleness/max",
        "sample_seconds": "timing_s/gen",
        "update_seconds": "timing_s/update_actor",
        "critic/value": "critic/vf_loss",
        "critic/value_clip_fraction": "critic/vf_clipfrac",
        "critic/mean": "critic/vpred_mean",
        "critic/returns": "critic/returns/mean",
        "critic/explained_variance": "critic/vf_explained_var",
        "validation_completion_length": "validation_completions/mean_length",
        "validation_truncated": "validation_completions/clipped_ratio",
    }
}
"""The "stage" of a line -> the old name of a metric -> the present one."""
PATTERNS = {
    "reinforce": (
        (r"sampler/staleness_share_(\d+)", r"sampling/staleness/share_\1"),
        (r"sampler/(.+)", r"sampling/\1"),
        (r"validation_(.+)_reward", r"validation_rewards/\1/mean"),
        (r"(?!validation_)(.+)_reward", r"rewards/\1/mean"),
    )
}
"""The "stage" of a line -> patterns of old names, of which the first that fits counts."""


def by_present_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics.jsonl with its metrics by the names they have today."""
    stage = str(line.get("stage"))
    if stage not in RENAMED:
        return dict(line)
    found = {present_name(stage, name): value for name, value in line.items()}
    # A line that says "policy" is of a time when "kl" was the term of the loss; today it is a mean
    # over tokens, whatever mean the loss takes.
    if "policy" in line and "kl" in line:
        found["kl_loss"] = found.pop("kl")
    return found


@functools.lru_cache(maxsize=4096)
def present_name(stage: str, name: str) -> str:
    """Returns what a metric that once was `name` is called today."""
    if name in RENAMED[stage]:
        return RENAMED[stage][name]
    for pattern, new in PATTERNS[stage]:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return name
