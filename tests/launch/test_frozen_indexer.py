"""Reinforcement with reinforce.indexer = "frozen"; tests/launch/test_reinforce.py has the other."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from errors import UserError
from launch import reinforce
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401, a fixture that every test has
    lines,
    run_of,
    state_of,
)
from train.optimizer import is_indexer, path_of

pytestmark = pytest.mark.command


def test_a_frozen_indexer_does_not_move():
    """To the bit, whatever the weight of its loss and decay; it has no moments; all else moves."""
    changes = {"train__stage": "sparse", "sampling__attention": "sparse", "train__steps": 2}
    changes |= {"train__save_every": 1, "train__max_to_keep": 9, "reinforce__indexer": "frozen"}
    config = run_of("length", **changes)
    assert config.train.weight_decay and config.train.indexer_weight
    reinforce.run(config, Path("run"))
    assert [line["indexer_grad_norm"] for line in lines("run")] == [0, 0]
    unweighted = dataclasses.replace(config.train, indexer_weight=0.0)
    as_trained = dataclasses.replace(config, train=unweighted)
    first, last = (state_of(as_trained, "run", step) for step in (1, 2))
    params = zip(jax.tree.leaves_with_path(first.params), jax.tree.leaves(last.params), strict=True)
    moved = {(is_indexer(path_of(path)), bool(np.any(a != b))) for (path, a), b in params}
    assert (True, False) in moved and (True, True) not in moved and (False, True) in moved
    with pytest.raises(UserError, match=r"mu/.*/indexer/head_weight is not there"):
        state_of(config, "run", 2)  # as an optimizer that trains it would read it
