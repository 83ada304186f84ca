"""Lines of older runs have the names of today, by the phase that they are of."""

import json
import re

import pytest

from report.results import read_run
from train.metric_names import PATTERNS, RENAMED, by_present_names
from train.metrics import Metrics, read_metrics

OLD = {
    "step": 3, "stage": "reinforce", "time": 1.0, "loss": 0.5, "policy": 0.4, "kl": 0.2,
    "reward": 1.0, "answer_reward": 0.75, "my_own_reward": 0.5, "completion_length": 20.0,
    "truncated": 0.25, "clip_fraction_low": 0.1, "ratio": 1.5, "logprob_gap_max": 1e-5,
    "sampler/staleness_share_2": 0.5, "sampler/routes_jaccard_3": 0.9, "critic/returns": 1.5,
    "validation_reward": 0.9, "validation_answer_reward": 0.7, "validation_pass_at_1": 0.6,
    "sample_seconds": 2.0,
}  # fmt: skip
PRESENT = {
    "step": 3, "stage": "reinforce", "time": 1.0, "loss": 0.5, "policy_loss": 0.4, "kl_loss": 0.2,
    "reward": 1.0, "rewards/answer/mean": 0.75, "rewards/my_own/mean": 0.5,
    "completions/mean_length": 20.0, "completions/clipped_ratio": 0.25, "clip_ratio/low_mean": 0.1,
    "ratio/mean": 1.5, "sampling/sampling_logp_difference/max": 1e-5,
    "sampling/staleness/share_2": 0.5, "sampling/routes_jaccard_3": 0.9,
    "critic/returns/mean": 1.5, "validation_reward": 0.9, "validation_rewards/answer/mean": 0.7,
    "validation_pass_at_1": 0.6, "timing_s/gen": 2.0,
}  # fmt: skip


def test_a_line_of_before_is_read_under_the_names_of_today():
    assert by_present_names(OLD) == PRESENT
    assert by_present_names(PRESENT) == PRESENT, "and one of today as it is"


def test_kl_of_today_is_none_of_the_loss():
    line = {"stage": "reinforce", "kl": 0.1, "kl_loss": 0.2, "policy_loss": 0.3}
    assert by_present_names(line) == line


def test_other_phases_keep_their_names():
    """A pretraining run may call something of its own "ratio" or "policy"."""
    line = {"stage": "pretrain", "ratio": 1.0, "policy": 2.0, "kl": 3.0, "validation_lm": 4.0}
    assert by_present_names(line) == line
    assert by_present_names({"ratio": 1.0}) == {"ratio": 1.0}


def test_a_run_of_before_goes_on_and_is_reported_under_the_names_of_today(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(OLD) + "\n")
    with Metrics(tmp_path, "reinforce", resume_step=3) as metrics:
        metrics.write(4, {"completions/mean_length": 21.0})
    assert [line["completions/mean_length"] for line in read_metrics(path)] == [20.0, 21.0]
    assert "completion_length" not in path.read_text()
    found = read_run(tmp_path, lambda _: None).phases["reinforce"]
    assert [line["completions/mean_length"] for line in found] == [20.0, 21.0]


@pytest.mark.parametrize("stage", RENAMED)
def test_no_name_of_today_is_one_of_before(stage):
    """Or reading a line twice would rename it twice."""
    for name in RENAMED[stage].values():
        assert name not in RENAMED[stage]
        assert not any(re.fullmatch(pattern, name) for pattern, _ in PATTERNS[stage])
