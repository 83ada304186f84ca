"""A run of reinforcement that is long keeps nothing of its steps, and compiles nothing more."""

from pathlib import Path

import jax
import pytest

from launch import reinforce
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401, a fixture that every test has
    lines,
    run_of,
)
from tests.rl.test_many_requests import used
from train.monitor import StepLog

pytestmark = pytest.mark.command
COMPILED = "/jax/core/compile/backend_compile_duration"


class Watched:
    """Takes down, after each step, memory, descriptors, and programs compiled so far."""

    def __init__(self, monkeypatch):
        self.compiled, self.seen = 0, {}
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        record = StepLog.record

        def watched(log, step, *args):
            record(log, step, *args)
            self.seen[step] = (*used(), self.compiled)

        monkeypatch.setattr(StepLog, "record", watched)

    def listen(self, event: str, *_, **__) -> None:
        self.compiled += event == COMPILED

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self.listen)


@pytest.fixture
def watched(monkeypatch):
    found = Watched(monkeypatch)
    yield found
    found.close()


def test_no_length_compiles_a_program_after_the_first_steps(watched):
    """Completions of 1 to 40 tokens, of random bytes; the second step has a state that a step made,
    and the last one all that is written at the end.
    """
    config = run_of("length", sampling__max_new_tokens=40, train__steps=8, train__save_every=100)
    reinforce.run(config, Path("run"))
    compiled = [watched.seen[step][2] for step in range(1, 9)]
    assert compiled[0] > 3 and compiled[1:] == [compiled[1]] * 7, compiled
    assert len({line["completions/mean_length"] for line in lines("run")}) == 8


@pytest.mark.slow
def test_five_hundred_steps_leave_memory_and_descriptors_flat(watched):
    """As much memory after 500 steps as after 100, but for 3 % of what allocators do; checkpoints,
    evaluations, traces and a curriculum among them.
    """
    config = run_of(
        "length", "answer", train__steps=500, train__save_every=50, train__eval_every=50,
        train__max_to_keep=2, evaluate__problems=4, evaluate__samples=2,
        reinforce__order="unsolved", reinforce__zero_variance="replaced",
        reinforce__variance_reward="own.py:length", reinforce__lag=1,
    )  # fmt: skip
    reinforce.run(config, Path("run"))
    memory, descriptors, compiled = watched.seen[100]
    assert watched.seen[500][0] <= 1.03 * memory, watched.seen
    assert watched.seen[500][1] <= descriptors, watched.seen
    assert watched.seen[500][2] == compiled, watched.seen
