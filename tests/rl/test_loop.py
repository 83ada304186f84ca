"""The parts of a reinforcement step: problems, rewards, minibatches, metrics, and the schedule."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tasks.problem import Problem
from data.tokenizer import Tokenizer
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.algorithms.options import Options
from rl.algorithms.spec import get_algorithm
from rl.batches import learnt_from, minibatches, rows, with_ages
from rl.config import ReinforceConfig, SamplingConfig
from rl.learner import per_update
from rl.loop import corrects
from rl.measure import lengths_by_outcome, observe, over_updates, speeds
from rl.pay import OVERLONG, Rewards, overlong_penalty
from rl.pay import reward as paid_reward
from rl.problems import problem_of_draw
from rl.request import Counts
from rl.rollouts import Group
from rl.trajectory import batch_of
from tests import tiny
from tests.trajectories import completion
from train.setup import Setup

PROBLEMS = [Problem(f"what is {n}?", str(n), trace="", ops=1) for n in range(10)]
CONFIG = ReinforceConfig(prompts_per_step=4, group_size=2, minibatches=2, epochs=2)


def test_problems_depend_on_the_number_of_the_draw_and_the_seed_alone():
    drawn = [problem_of_draw(number, PROBLEMS, seed=0) for number in range(10)]
    assert problem_of_draw(4, PROBLEMS, seed=0) == drawn[4]
    assert [problem_of_draw(number, PROBLEMS, seed=1) for number in range(10)] != drawn


def test_every_epoch_has_every_problem_once_in_its_own_order():
    """However few there are."""
    for few in (PROBLEMS, PROBLEMS[:3]):
        drawn = [problem_of_draw(number, few, 0).answer for number in range(8 * len(few))]
        epochs = [tuple(drawn[at : at + len(few)]) for at in range(0, len(drawn), len(few))]
        assert all(sorted(epoch) == [problem.answer for problem in few] for epoch in epochs)
        assert len(set(epochs)) > 2


def reward(completions, problems, config, options: Options | None = None) -> Rewards:
    given = config.rewards, config.truncated, options or Options()
    return paid_reward(completions, problems, *given, longest=8)


def rewards_of(**by_name: list) -> Rewards:
    paid_MPG = np.asarray(list(by_name.values()), np.float32)
    return Rewards(tuple(by_name), np.ones(len(by_name), np.float32), paid_MPG)


TEXTS = [f"<think>hm</think><answer>{n}</answer>" for n in (3, 4, 4, 4)]


def test_rewards_of_a_group_are_those_of_its_problem():
    config = dataclasses.replace(CONFIG, rewards={"answer": 1.0, "format": 0.0})
    rewards = reward(list(map(completion, TEXTS)), [PROBLEMS[3], PROBLEMS[4]], config)
    np.testing.assert_array_equal(rewards.total_PG, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(rewards.paid_MPG[0], [[1, 0], [1, 1]])
    assert rewards.means() == {"answer": 0.75, "format": 1.0}


def test_a_truncated_completion_is_paid_by_default_and_not_on_request():
    cut = (True, False, True, False)
    completions = [completion(text, cut=each) for text, each in zip(TEXTS, cut, strict=True)]
    for option, paid in (
        ("reward", [[1.1, 0.1], [1.1, 1.1]]),
        ("mask", [[1.1, 0.1], [1.1, 1.1]]),
        ("no_reward", [[0, 0.1], [0, 1.1]]),
    ):
        config = dataclasses.replace(CONFIG, truncated=option)
        rewards = reward(completions, [PROBLEMS[3], PROBLEMS[4]], config)
        np.testing.assert_allclose(rewards.total_PG, paid, rtol=1e-6)
    assert ReinforceConfig().truncated == "reward"


def test_nothing_is_learnt_from_what_is_masked():
    """Its tokens are attended to like any others."""
    completions = [completion(text, cut=place == 0) for place, text in enumerate(TEXTS)]
    for option, learnt in (("reward", [2, 2, 2, 2]), ("mask", [0, 2, 2, 2])):
        batch = batch_of([each.trajectory for each in completions], width=7, pad=0)
        batch = learnt_from(batch, completions, option)
        np.testing.assert_array_equal(batch["mask"].sum(axis=1), learnt)
        np.testing.assert_array_equal(batch["segments"].sum(axis=1), [5] * 4)


def test_what_is_paid_goes_with_its_trajectory_and_absent_ones_are_none():
    rewards = rewards_of(answer=[[1, 0], [3, 0]], format=[[1, 1], [0, 1]])
    arrays = rewards.arrays(most=6, greedy=np.asarray([0.5, 2], np.float32))
    np.testing.assert_array_equal(arrays["outcome_N"], [2, 1, 3, 1, 0, 0])
    np.testing.assert_array_equal(arrays["rewards_MN"][1], [1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(arrays["groups_N"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(arrays["present_N"], [True] * 4 + [False] * 2)
    np.testing.assert_array_equal(arrays["greedy_N"], [0.5, 0.5, 2, 2, 0, 0])


def test_the_soft_punishment_of_long_completions():
    """DAPO's: none up to 16,384 of 20,480 tokens, then in a line to -1."""
    lengths = np.array([10, 16_384, 18_432, 20_480])
    np.testing.assert_allclose(overlong_penalty(lengths, 20_480, 4_096), [0, 0, -0.5, -1])
    completions = [completion("", length=length) for length in (2, 6, 7, 8)]
    options = Options(soft_overlong=4, overlong_weight=0.5)
    rewards = reward(completions, PROBLEMS[:2], CONFIG, options)
    assert rewards.names[-1] == OVERLONG
    np.testing.assert_allclose(rewards.paid_MPG[-1], [[0, -0.5], [-0.75, -1]])
    np.testing.assert_allclose(rewards.total_PG, [[0, -0.25], [-0.375, -0.5]])


@pytest.fixture(scope="module")
def setup() -> Setup:
    one_device = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])
    return Setup(tiny.MODEL, Tokenizer.__new__(Tokenizer), one_device)


def test_ages_of_tokens_and_their_bound():
    """Of step 6: versions 5, 4 and 2 are 0, 1 and 3 steps older."""
    versions_BT = np.asarray([[-1, 5, 4, 2]])
    batch = {"versions": versions_BT, "mask": versions_BT >= 0}
    found = with_ages(batch, step=6, most=-1)
    assert found["mask"].tolist() == [[False, True, True, True]]
    assert found["stale"].tolist() == [[False, False, True, True]]
    found = with_ages(batch, step=6, most=1)
    assert found["mask"].tolist() == [[False, True, True, False]]
    assert found["stale"].tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    "spec, old_logprobs, expected",
    [
        ("dapo", "sampler", True),
        ("dapo", "trainer", False),
        ("dapo?correction=token_truncate", "trainer", True),
        ("gpg", "sampler", False),
        ("gtpo_conflict", "sampler", False),
        ("scale_rl", "sampler", True),
        ("m2po", "sampler", True),
    ],
)
def test_which_algorithms_correct_for_old_samples(spec, old_logprobs, expected):
    config = dataclasses.replace(CONFIG, old_logprobs=old_logprobs)
    assert corrects(get_algorithm(spec, max_completion=4), config) is expected


def test_each_epoch_cuts_the_whole_batch_in_its_own_order(setup):
    batch = {"tokens": jnp.arange(16).reshape(8, 2), "mask": jnp.arange(8)}
    batch["segments"] = jnp.ones((8, 2))
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


def test_rows_of_padding_are_spread_over_the_parts(setup):
    """Of four completions, where a step may have eight: two in each of two parts."""
    setup = dataclasses.replace(setup, tokenizer=SimpleNamespace(pad=0))
    trajectories = [completion(text).trajectory for text in TEXTS]
    sampling = SamplingConfig(max_prompt_tokens=4, max_new_tokens=5)
    batch = rows(trajectories, setup, sampling, (), most=8)
    assert batch["tokens"].shape == (8, 9)
    np.testing.assert_array_equal(batch["trajectory"][:, 0], [0, 1, 2, 3, -1, -1, -1, -1])
    packed = rows(trajectories, setup, sampling, (), most=8, multiple=2)
    assert packed["tokens"].shape == (4, 9)  # five tokens each: one in a row
    for part in minibatches(setup, jax.tree.map(jnp.asarray, batch), CONFIG, seed=0, step=1):
        assert np.sum(part["trajectory"][:, 0] >= 0) == 2


def test_what_is_observed_of_completions():
    completions = [completion("", length=2), completion("", length=3, cut=True)]
    rewards = rewards_of(**{"answer": [[1.0, 0.0]], "my.py:brevity": [[0.25, 0.5]]})
    groups = [Group(PROBLEMS[0], completions, rewards)]
    assert "sampling/tokens_per_pass" not in observe(groups, Counts(passes=9))
    counts = Counts(passes=10, drafted=20, accepted=5)
    observed = observe(groups, counts)
    assert observed.pop("reward_std") == pytest.approx(0.75 / np.sqrt(2)), "TRL's, by n - 1"
    assert observed.pop("rewards/answer/std") == pytest.approx(1 / np.sqrt(2))
    assert observed.pop("rewards/brevity/std") == pytest.approx(0.25 / np.sqrt(2))
    assert observed == {
        "sampling/drafts_accepted": 0.25, "sampling/tokens_per_pass": 1.5,
        "reward": 0.875, "rewards/answer/mean": 0.5, "rewards/brevity/mean": 0.375,
        "frac_reward_zero_std": 0, "tokens": 5, "completions/clipped_ratio": 0.5,
        "completions/min_length": 2, "completions/mean_length": 2.5, "completions/max_length": 3,
        "completions/min_terminated_length": 2, "completions/mean_terminated_length": 2,
        "completions/max_terminated_length": 2,
    }  # fmt: skip


def test_what_is_observed_where_no_completion_ends_and_of_a_single_one():
    cut = [Group(PROBLEMS[0], [completion("", length=3, cut=True)], rewards_of(answer=[[1.0]]))]
    observed = observe(cut, Counts())
    assert observed["completions/mean_terminated_length"] == 0, "as TRL has it"
    assert observed["reward_std"] == 0 and observed["frac_reward_zero_std"] == 1


def test_metrics_of_a_step_are_means_over_its_updates():
    """But for what compares with the sampler, counters, and extremes.

    An effective sample size is that of weights 1, 1 and 0.8, 2 over both updates.
    """
    gap, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    size = "rollout_corr/rollout_is_eff_sample_size"
    measured = [
        {"clip_ratio/low_mean": 0.0, f"{gap}/max": 1e-6, f"{gap}/mean": 1e-7, "grad_norm": 1.0,
         f"{ratio}/min": 0.5, f"{ratio}/mean": 1.5, size: 2.5, "fresh_share": 0.5,
         "skipped": 0, "skipped_in_row": 0, "learning_rate": 0.1, "expert_load": [0.0, 2.0],
         "critic/learning_rate": 1.0, "ratio/mean": 1.0, "ratio/effective_sample_size": 1.0,
         "ratio/max": 1.0, "ratio/min": 1.0},
        {"clip_ratio/low_mean": 0.5, f"{gap}/max": 3.0, f"{gap}/mean": 1.0, "grad_norm": 2.0,
         f"{ratio}/min": 0.1, f"{ratio}/mean": 9.0, size: 99.0, "fresh_share": 0.0,
         "skipped": 1, "skipped_in_row": 1, "learning_rate": 0.2, "expert_load": [1.0, 1.0],
         "critic/learning_rate": 2.0, "ratio/mean": 1.4, "ratio/effective_sample_size": 2.32,
         "ratio/max": 2.0, "ratio/min": 0.8},
    ]  # fmt: skip
    updates = [{name: jnp.asarray(value) for name, value in each.items()} for each in measured]
    found = over_updates(updates)
    expected = {
        "clip_ratio/low_mean": 0.25, f"{gap}/max": 1e-6, f"{gap}/mean": 1e-7, "grad_norm": 1.5,
        f"{ratio}/min": 0.5, f"{ratio}/mean": 1.5, size: 1.5**2 / 2.5,
        "skipped": 1, "skipped_in_row": 1, "learning_rate": 0.2, "critic/learning_rate": 2.0,
        "ratio/mean": 1.2, "ratio/effective_sample_size": 4.8**2 / 4 / 6.64,
        "ratio/max": 2.0, "ratio/min": 0.8,
    }  # fmt: skip
    load = found.pop("expert_load")
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    np.testing.assert_allclose(load, [0.5, 1.5])
    of_old_weights = over_updates(updates[::-1]).keys()
    assert found.keys() - of_old_weights == {f"{gap}/max", f"{gap}/mean"}, "nothing is fresh"


def test_tokens_a_second_of_both_sides():
    """The critic's seconds are of the updates; a part that did not run took none."""
    seconds = {"timing_s/gen": 2.0, "timing_s/update_actor": 3.0, "timing_s/reward": 9.0}
    found = speeds(seconds | {"timing_s/update_critic": 1.0}, sampled=10, learnt=100)
    assert found == {"perf/gen_tokens_per_s": 5.0, "perf/update_tokens_per_s": 25.0}
    assert speeds({}, sampled=0, learnt=7)["perf/update_tokens_per_s"] == 0


def test_the_schedule_counts_updates_where_the_config_counts_steps():
    train = tiny.train_config(steps=10, warmup_steps=2, constant_steps=3, cosine_steps=-1)
    scaled = per_update(train, updates=4)
    assert (scaled.steps, scaled.warmup_steps, scaled.constant_steps) == (40, 8, 12)
    assert scaled.cosine_steps == -1 and scaled.mtp_weight == 0
    assert per_update(dataclasses.replace(train, cosine_steps=5), 4).cosine_steps == 20


def test_lengths_of_what_solves_and_of_what_does_not():
    completions = [completion("", length=length) for length in (2, 4, 9, 5)]
    groups = [
        Group(PROBLEMS[0], completions[:2], rewards_of(answer=[[1, 1]])),
        Group(PROBLEMS[1], completions[2:], rewards_of(answer=[[0, 1]])),
    ]

    def solves(rewards: Rewards) -> np.ndarray:
        return rewards.total_PG.ravel() == 1

    found = lengths_by_outcome(groups, solves)
    assert found["completions/mean_solved_length"] == pytest.approx((2 + 4 + 5) / 3)
    assert found["completions/mean_unsolved_length"] == 9
    assert len(lengths_by_outcome(groups[:1], solves)) == 1, "there are no others"
