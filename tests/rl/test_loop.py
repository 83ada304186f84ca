"""The parts of a reinforcement step: problems, rewards, minibatches, metrics, and the schedule."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tasks.problem import Problem
from data.tokenizer import Tokenizer
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.config import ReinforceConfig
from rl.generate import Generation
from rl.loop import Rewards, minibatches, observe, per_update, problems_of_step, reward
from rl.sampler import Completions
from tests import tiny
from train.setup import Setup

PROBLEMS = [Problem(f"what is {n}?", str(n), trace="", ops=1) for n in range(10)]
CONFIG = ReinforceConfig(prompts_per_step=4, group_size=2, minibatches=2, epochs=2)


def test_problems_of_a_step_depend_on_the_step_and_seed_alone():
    steps = [problems_of_step(step, PROBLEMS, count=4, seed=0) for step in (1, 2, 3)]
    assert problems_of_step(2, PROBLEMS, count=4, seed=0) == steps[1]
    assert problems_of_step(2, PROBLEMS, count=4, seed=1) != steps[1]


def test_every_epoch_has_every_problem_once_in_its_own_order():
    drawn = [p for step in range(1, 6) for p in problems_of_step(step, PROBLEMS, 4, seed=0)]
    first, second = drawn[:10], drawn[10:]
    assert Counter(p.answer for p in first) == Counter(p.answer for p in PROBLEMS)
    assert Counter(p.answer for p in second) == Counter(p.answer for p in PROBLEMS)
    assert first != second


def test_rewards_of_a_group_are_those_of_its_problem():
    config = dataclasses.replace(CONFIG, answer_reward=1.0, format_reward=0.0)
    texts = [f"<think>hm</think><answer>{n}</answer>" for n in (3, 4, 4, 4)]
    rewards = reward(texts, [PROBLEMS[3], PROBLEMS[4]], config)
    np.testing.assert_array_equal(rewards.total_PG, [[1, 0], [1, 1]])
    assert rewards.by_name["answer"] == [1, 0, 1, 1]


@pytest.fixture(scope="module")
def setup() -> Setup:
    one_device = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])
    return Setup(tiny.MODEL, Tokenizer.__new__(Tokenizer), one_device)


def test_each_epoch_cuts_the_whole_batch_in_its_own_order(setup):
    batch = {"tokens": jnp.arange(16).reshape(8, 2), "mask": jnp.arange(8)}
    parts = list(minibatches(setup, batch, CONFIG, seed=0, step=1))
    assert [part["mask"].shape for part in parts] == [(4,)] * 4
    first, second = np.concatenate([p["mask"] for p in parts]).reshape(2, 8)
    assert sorted(first) == sorted(second) == list(range(8)) and list(first) != list(second)
    for part in parts:  # all arrays of a row stay one row
        np.testing.assert_array_equal(part["tokens"][:, 0], 2 * part["mask"])


def test_a_single_minibatch_is_the_batch_itself(setup):
    batch = {"tokens": jnp.zeros((8, 2))}
    whole = dataclasses.replace(CONFIG, minibatches=1)
    parts = list(minibatches(setup, batch, whole, seed=0, step=1))
    assert len(parts) == 2 and all(part is batch for part in parts)


def test_what_is_observed_of_completions():
    tokens_BC = np.asarray([[5, 9, 0], [5, 6, 7]])
    mask_BC = np.asarray([[True, True, False], [True, True, True]])
    nothing = jnp.zeros(())
    generation = Generation(
        nothing, nothing, Completions(nothing, nothing, nothing), tokens_BC, mask_BC, ["", ""]
    )
    rewards = Rewards(np.asarray([[1.0, 0.0]], np.float32), {"answer": [1, 0], "format": [0, 0]})
    observed = observe(generation, rewards, stops=(9,))
    assert observed["reward"] == 0.5 and observed["answer_reward"] == 0.5
    assert observed["truncated"] == 0.5 and observed["tokens"] == 5
    assert observed["completion_length"] == 2.5 and observed["zero_variance_groups"] == 0


def test_the_schedule_counts_updates_where_the_config_counts_steps():
    train = tiny.train_config(steps=10, warmup_steps=2, constant_steps=3, cosine_steps=-1)
    scaled = per_update(train, updates=4)
    assert (scaled.steps, scaled.warmup_steps, scaled.constant_steps) == (40, 8, 12)
    assert scaled.cosine_steps == -1 and scaled.mtp_weight == 0
    assert per_update(dataclasses.replace(train, cosine_steps=5), 4).cosine_steps == 20
