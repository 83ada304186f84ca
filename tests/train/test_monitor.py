"""What is due after which step, and what is written of a step."""

import json

import jax.numpy as jnp
import pytest

from errors import UserError
from tests import tiny
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.progress import Progress

TRAIN = tiny.train_config(
    steps=10, log_every=4, eval_every=5, eval_batches=1, save_every=3, max_skipped=2
)
STEPS = range(1, 11)


def test_each_thing_is_due_at_its_period_and_after_the_last_step():
    due = Due(TRAIN)
    assert [step for step in STEPS if due.log(step)] == [1, 4, 8, 10]
    assert [step for step in STEPS if due.evaluation(step)] == [5, 10]
    assert [step for step in STEPS if due.save(step)] == [3, 6, 9, 10]


@pytest.mark.parametrize("eval_every, steps", [(0, [10]), (3, [3, 6, 9, 10])])
def test_evaluation_without_a_period_is_at_the_end(eval_every, steps):
    due = Due(tiny.train_config(steps=10, eval_every=eval_every, eval_batches=1))
    assert [step for step in STEPS if due.evaluation(step)] == steps


def test_no_batches_are_no_evaluation():
    due = Due(tiny.train_config(steps=10, eval_every=1, eval_batches=0))
    assert not any(map(due.evaluation, STEPS))


def values(skipped_in_row: int = 0) -> dict:
    return {
        "lm": jnp.asarray(2.5),
        "expert_load": jnp.ones((2, 4)),
        "skipped_in_row": jnp.asarray(skipped_in_row),
    }


def test_arrays_are_written_after_the_last_step_only(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics, Progress(10, "run") as progress:
        log = StepLog(TRAIN, metrics, progress)
        for step in STEPS:
            log.record(step, values(), tokens=8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 8, 10]
    assert ["expert_load" in line for line in lines] == [False, False, False, True]
    assert all(line["lm"] == 2.5 and line["tokens_per_s"] >= 0 for line in lines)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics, Progress(10, "run") as progress:
        log = StepLog(TRAIN, metrics, progress)
        log.record(1, values(skipped_in_row=1), tokens=8)
        with pytest.raises(UserError, match=r"step 2: the gradients of the last 2 steps were not"):
            log.record(2, values(skipped_in_row=2), tokens=8)
