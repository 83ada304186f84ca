"""launch.reinforce in parts: killed and resumed, metrics, and what is learnt from once."""

import json
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest

from errors import UserError
from experiment.schema import Config
from launch import reinforce
from rl.rollouts import Rollouts
from tests.launch.documented_metrics import check_documented
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401
    lines,
    on_devices,
    run_of,
)
from tests.launch.test_training_commands import final_variables, stopped_at

pytestmark = pytest.mark.command


def in_parts(**changes) -> Config:
    """Up to 40 tokens of random bytes, now and then stopped; six slots for twelve completions."""
    parts = {
        "reinforce__prompts_per_step": 4,
        "reinforce__prompts_in_flight": 6,
        "reinforce__rollout_tokens": 150,
        "reinforce__trace_completions": -1,
        "sampling__max_new_tokens": 40,
        "sampling__slots": 6,
        "train__steps": 6,
        "train__save_every": 2,
    }
    return run_of("length", **parts | changes)


def traces(workdir: str) -> list[dict]:
    return [json.loads(line) for line in Path(workdir, "traces.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("unfinished", ["read_again", "kept"])
def test_a_resumed_run_is_the_one_that_never_stopped(unfinished, monkeypatch):
    """To the bit, with what was unfinished. Every group is learnt from once, some by several
    policies, in steps of fewer groups than there may be.
    """
    config = in_parts(reinforce__unfinished=unfinished)
    assert reinforce.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        assert not reinforce.run(config, Path("parts"))
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    assert traces("parts") == traces("whole")
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    check_documented("whole", "parts")
    counted = Counter(each["group"] for each in traces("whole"))
    assert set(counted.values()) == {2}
    found = lines("whole")
    assert {line["groups"] for line in found} > {4} and min(line["groups"] for line in found) >= 1
    assert max(line["sampling/staleness/max"] for line in found) >= 1
    assert any(len(set(each["versions"]) - {-1}) > 1 for each in traces("whole"))
    # Of tokens that the step's own policy sampled, which with the older ones' cache is another.
    largest = max(line["sampling/sampling_logp_difference/max"] for line in found)
    assert 0 < largest < 1e-4 if unfinished == "read_again" else largest > 1e-3


def test_an_error_saves_where_it_was(monkeypatch):
    """What an error interrupts goes on from the step before, with what was unfinished."""
    config = in_parts(train__save_every=100)
    assert reinforce.run(config, Path("whole"))
    taken = Rollouts.take

    def fails(self, step, variables):
        groups = taken(self, step, variables)
        if step == 4:
            raise UserError("the network is gone")
        return groups

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "take", fails)
        with pytest.raises(UserError, match="the network is gone; step 3 is saved"):
            reinforce.run(config, Path("parts"))
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")


def test_packed_rows_and_minibatches_have_fewer_groups_too():
    options = {"packing": True, "minibatches": 2, "epochs": 2}
    changes = {f"reinforce__{name}": value for name, value in options.items()}
    config = in_parts(train__steps=3, train__balance_weight=0.0, **changes)
    assert reinforce.run(config, Path("run"))
    assert min(line["groups"] for line in lines("run")) < 4
    assert all(np.isfinite(line["loss"]) for line in lines("run"))


def test_steps_of_few_groups_are_divided_over_eight_devices(monkeypatch):
    """Fewer completions than devices: the other rows are padding, of what is compared too."""
    on_devices(8, monkeypatch)
    prompts = dict.fromkeys(("reinforce__prompts_per_step", "reinforce__prompts_in_flight"), 8)
    few = {"reinforce__rollout_tokens": 1, "sampling__slots": 1, "train__steps": 3}
    config = in_parts(**prompts | few)
    assert reinforce.run(config, Path("run"))
    assert min(line["groups"] for line in lines("run")) * 2 < 8
    # Later ones have completions whose experts an older policy chose.
    assert lines("run")[0]["sampling/routes_jaccard"] == 1
