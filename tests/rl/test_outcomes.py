"""Advantages of completions: groups of any size, equal rewards, values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms import outcomes
from rl.algorithms.experience import Experience
from rl.algorithms.outcomes import OUTCOMES

ULP = 1.2e-7  # float32 rounding of numbers near 1
# Those that are 0 where all rewards of a group are equal: all that compare in it.
COMPARE = [name for name in OUTCOMES if name not in ("reward", "greedy_baseline")]


def experience(rewards_PG, lengths_PG=None, absent: int = 0) -> Experience:
    """One row a completion, of as many tokens as said, behind a token of a prompt; [M, P, G] for
    several rewards. The last `absent` trajectories are padding.
    """
    rewards_MPG = np.asarray(rewards_PG, np.float32)
    rewards_MPG = rewards_MPG.reshape(-1, *rewards_MPG.shape[-2:])
    M, P, G = rewards_MPG.shape
    N = P * G
    lengths_N = np.ones(N, int) if lengths_PG is None else np.asarray(lengths_PG).ravel()
    T = int(lengths_N.max()) + 1
    places_NT = np.arange(T)
    inside_NT = places_NT <= lengths_N[:, None]
    mask_NT = inside_NT & (places_NT > 0)
    present_N = np.arange(N) < N - absent
    rewards_MN = np.where(present_N, rewards_MPG.reshape(M, N), 7.0).astype(np.float32)
    return Experience(
        rewards_MN=jnp.asarray(rewards_MN),
        weights_M=jnp.ones(M),
        outcome_N=jnp.asarray(rewards_MN.sum(axis=0)),
        groups_N=jnp.arange(N) // G,
        present_N=jnp.asarray(present_N),
        trajectory_BT=jnp.where(jnp.asarray(inside_NT), jnp.arange(N)[:, None], -1),
        mask_BT=jnp.asarray(mask_NT & present_N[:, None]),
        tokens_BT=jnp.zeros((N, T), jnp.int32),
        greedy_N=jnp.zeros(N),
    )


def of(name: str, given: Experience, **options) -> np.ndarray:
    """The advantage of each trajectory, which all of its tokens have."""
    found_BT = jax.jit(OUTCOMES[name](**options))(given).advantages_BT
    mask_BT = np.asarray(given.mask_BT)
    np.testing.assert_array_equal(np.asarray(found_BT)[~mask_BT], 0)
    first_N = np.asarray(found_BT)[:, 1]
    np.testing.assert_array_equal(np.where(mask_BT, first_N[:, None], 0), found_BT)
    return first_N


@pytest.mark.parametrize("name", COMPARE)
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_equal_rewards_are_exactly_zero(name, group):
    """Exactly: the mean of equal float32 rewards is often one rounding off, and a z-score would
    make that an advantage of 0.1. So for a group of one.
    """
    rewards_PG = np.broadcast_to(np.array([0.1, 1.1, -0.7, 1 / 3, 0.0])[:, None], (5, group))
    lengths_PG = 1 + np.arange(5 * group).reshape(5, group) % 4
    np.testing.assert_array_equal(of(name, experience(rewards_PG, lengths_PG)), 0)


@pytest.mark.parametrize("name", [name for name in OUTCOMES if name not in ("per_reward", "reward",
                                  "step_zscore", "signal_scaled")])  # fmt: skip
def test_prompts_do_not_meet(name):
    rewards_PG = np.random.default_rng(1).normal(size=(3, 4))
    alone = np.concatenate([of(name, experience(rewards_PG[p : p + 1])) for p in range(3)])
    np.testing.assert_allclose(of(name, experience(rewards_PG)), alone, rtol=1e-6)


@pytest.mark.parametrize("name", OUTCOMES)
def test_absent_trajectories_have_no_say(name):
    """A step with fewer groups is padded, whatever stands in the padding."""
    rewards_PG = np.random.default_rng(2).integers(0, 2, size=(3, 4)).astype(float)
    few = of(name, experience(rewards_PG[:2]))
    padded = of(name, experience(rewards_PG, absent=4))
    np.testing.assert_allclose(padded[:8], few, rtol=1e-6)
    np.testing.assert_array_equal(padded[8:], 0)


# Rewards 1, 0, 0, 1: squared deviations sum to 1, so std is sqrt(1/3) with ddof 1, 1/2 with 0.
HAND = {
    "group_centred": ({}, [0.5, -0.5, -0.5, 0.5]),
    "group_zscore": ({"eps": 0.0}, [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
    "group_zscore?ddof=0": ({"ddof": 0, "eps": 0.5}, [0.5, -0.5, -0.5, 0.5]),
    "leave_one_out": ({}, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
    "over_mean": ({}, [1, -1, -1, 1]),
    # Lengths 1, 2, 3, 4: the baseline is (1 + 4) / 10.
    "length_weighted": ({}, [0.5, -0.5, -0.5, 0.5]),
    "best_over_second": ({}, [0, 0, 0, 0]),
    "greedy_baseline": ({}, [1, 0, 0, 1]),
    "reward?baseline=step": ({"baseline": "step"}, [0.5, -0.5, -0.5, 0.5]),
    "reward": ({}, [1, 0, 0, 1]),
    # Half of the four completions have a reward that is not 0; all belong to a mixed prompt.
    "signal_scaled": ({}, [0.5, -0.5, -0.5, 0.5]),
    "signal_scaled?scale=rewards": ({"scale": "rewards"}, [1, -1, -1, 1]),
}


@pytest.mark.parametrize("name", HAND)
def test_by_hand(name):
    options, expected = HAND[name]
    given = experience([[1.0, 0.0, 0.0, 1.0]], [[1, 2, 3, 4]])
    np.testing.assert_allclose(of(name.partition("?")[0], given, **options), expected, rtol=3 * ULP)


def test_the_best_of_a_group_has_all():
    """3 over 1; std of 0, 1, 3 with ddof 1 is sqrt(7/3)."""
    given = experience([[0.0, 3.0, 1.0]])
    np.testing.assert_allclose(of("best_over_second", given, scaled=False), [0, 2, 0])
    scaled = of("best_over_second", given, eps=0.0)
    np.testing.assert_allclose(scaled, [0, 2 / np.sqrt(7 / 3), 0], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_draws(k):
    """Every subset of k of the group is a draw, rewarded by whether any is right; a completion's
    advantage is the mean of the z-scores of the draws that have it.
    """
    import itertools

    rewards_N = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    draws = list(itertools.combinations(range(5), k))
    right = np.array([rewards_N[list(draw)].max() for draw in draws])
    scores = (right - right.mean()) / max(right.std(), 1e-30)
    expected = [np.mean([s for s, d in zip(scores, draws, strict=True) if i in d])
                for i in range(5)]  # fmt: skip
    found = of("pass_at_k", experience([rewards_N]), k=k, eps=0.0)
    # With k = 4 every draw has a right one: nothing to learn, where the mean above is 0 too.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = np.stack(
        [rewards_PG[:, i] - np.delete(rewards_PG, i, axis=1).mean(axis=1) for i in range(5)], axis=1
    )
    # A few roundings of numbers of size 1 to 3.
    found = of("leave_one_out", experience(rewards_PG))
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-6)


def test_scale_of_the_reward_matters_to_dr_grpo_alone():
    """A z-score forgets the scale of a group's rewards (up to eps); the centred advantage keeps it.
    So a weight per prompt has no effect in GRPO.
    """
    one, three = experience([[1.0, 0.0, 0.0, 1.0]]), experience([[3.0, 0.0, 0.0, 3.0]])
    # eps is 1e-6, over a standard deviation of 0.58.
    np.testing.assert_allclose(of("group_zscore", three), of("group_zscore", one), rtol=2e-6)
    np.testing.assert_allclose(of("group_centred", three), 3 * of("group_centred", one), rtol=ULP)


def test_the_step_scales_alike_over_prompts():
    """Centred rewards +-1/2 and +-1/4; over all four, ddof 1, their std is sqrt(5/24)."""
    given = experience([[1.0, 0.0], [1.0, 0.5]])
    expected = np.array([0.5, -0.5, 0.25, -0.25])
    found = of("step_zscore", given, eps=0.0)
    np.testing.assert_allclose(found, expected / np.sqrt(5 / 24), rtol=1e-6)
    raw = np.std([1.0, 0.0, 1.0, 0.5], ddof=1)
    found = of("step_zscore", given, eps=0.0, spread="rewards")
    np.testing.assert_allclose(found, expected / raw, rtol=1e-6)


def test_a_small_reward_is_not_drowned():
    """GRPO of the sum sees the large reward alone; GDPO gives both the same say."""
    rewards_MPG = [[[100.0, 0.0, 100.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]]]
    given = experience(rewards_MPG)
    summed, apart = of("group_zscore", given), of("per_reward", given)
    assert summed[0] - summed[2] < 0.02
    np.testing.assert_allclose(apart[0] - apart[2], apart[0] - apart[1], rtol=1e-5)
    np.testing.assert_allclose([apart.mean(), apart.std(ddof=1)], [0, 1], atol=1e-5)


def test_a_group_of_one_may_keep_its_reward():
    """As in verl, whose mean is then 0 and whose std 1."""
    given = experience([[0.5], [2.0]])
    for name in ("group_centred", "leave_one_out", "length_weighted"):
        np.testing.assert_allclose(of(name, given, single="reward"), [0.5, 2.0])
    np.testing.assert_allclose(of("group_zscore", given, single="reward"), [0.5, 2.0], rtol=2e-6)


def test_an_option_that_is_not_there_is_refused():
    from errors import UserError

    for build in (
        lambda: outcomes.group_zscore(single="mean"),
        lambda: outcomes.reward(baseline="group"),
        lambda: outcomes.per_reward(whiten="all"),
        lambda: outcomes.pass_at_k(k=0),
    ):
        with pytest.raises(UserError):
            build()


def test_a_deviation_of_the_others_is_none_where_they_are_equal():
    """Rewards 1.1, 0.3 and 0.3: what rounding leaves of the others' deviation scales nothing."""
    advantage = outcomes.leave_one_out(spread="others")
    found = advantage(experience([[1.1, 0.3, 0.3]])).advantages_BT[:, 1]
    other = -0.4 / (0.8 / 2**0.5 + 1e-6)
    np.testing.assert_allclose(found, [0.8, other, other], rtol=10 * ULP)
