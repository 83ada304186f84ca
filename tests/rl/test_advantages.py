"""An advantage compares the completions of one prompt, and equal rewards teach nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.advantages import group_centred, group_zscore, leave_one_out

ADVANTAGES = {
    "centred": group_centred,
    "zscore": group_zscore(ddof=1, eps=1e-6),
    "leave_one_out": leave_one_out,
}
REWARDS = jnp.array([[1.0, 0.0], [1.0, 0.5]])
ULP = 1.2e-7  # float32 rounding of numbers near 1


@pytest.mark.parametrize(
    "name, expected",
    [
        # verl's core_algos in float64, recorded in the golden values of the reference (z-score: 0.5
        # / (0.70710678 + 1e-6) and 0.25 / (0.35355339 + 1e-6)).
        ("zscore", [[0.70710578, -0.70710578], [0.70710478, -0.70710478]]),
        ("leave_one_out", [[1.0, -1.0], [0.5, -0.5]]),
        ("centred", [[0.5, -0.5], [0.25, -0.25]]),
    ],
)
def test_golden(name, expected):
    chex.assert_trees_all_close(ADVANTAGES[name](REWARDS), jnp.array(expected), rtol=ULP)


def test_zscore_by_hand():
    """Rewards 1, 0, 0, 1: squared deviations sum to 1, so std is sqrt(1/3) with ddof 1 and 1/2 with
    ddof 0.
    """
    rewards_PG = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    signs = jnp.array([[1.0, -1.0, -1.0, 1.0]])
    chex.assert_trees_all_close(
        group_zscore(ddof=1, eps=0.0)(rewards_PG), signs * 0.8660254, rtol=ULP
    )
    chex.assert_trees_all_close(group_zscore(ddof=0, eps=0.5)(rewards_PG), signs * 0.5, rtol=ULP)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = np.stack(
        [rewards_PG[:, i] - np.delete(rewards_PG, i, axis=1).mean(axis=1) for i in range(5)], axis=1
    )
    # A few roundings of numbers of size 1 to 3.
    np.testing.assert_allclose(leave_one_out(jnp.asarray(rewards_PG)), expected, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_equal_rewards_are_exactly_zero(name, group):
    """Exactly: the mean of equal float32 rewards is often one rounding off, and a z-score would
    make that an advantage of 0.1. So for a group of one.
    """
    rewards_PG = jnp.broadcast_to(jnp.array([0.1, 1.1, -0.7, 1 / 3, 0.0])[:, None], (5, group))
    chex.assert_trees_all_equal(jax.jit(ADVANTAGES[name])(rewards_PG), jnp.zeros((5, group)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_prompts_do_not_meet(name):
    rewards_PG = jnp.array(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)
    alone = jnp.concatenate([ADVANTAGES[name](rewards_PG[p : p + 1]) for p in range(3)])
    chex.assert_trees_all_close(ADVANTAGES[name](rewards_PG), alone, rtol=1e-6)
    assert jnp.abs(jnp.sum(alone, axis=1)).max() < 1e-5  # zero mean in each group, up to rounding


def test_scale_of_the_reward_matters_to_dr_grpo_alone():
    """A z-score forgets the scale of a group's rewards (up to eps); the centred advantage keeps it.
    So a weight per prompt has no effect in GRPO.
    """
    rewards_PG = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    # eps is 1e-6, over a standard deviation of 0.58.
    chex.assert_trees_all_close(
        ADVANTAGES["zscore"](3 * rewards_PG), ADVANTAGES["zscore"](rewards_PG), rtol=2e-6
    )
    chex.assert_trees_all_close(
        group_centred(3 * rewards_PG), 3 * group_centred(rewards_PG), rtol=ULP
    )


def test_integer_and_bool_rewards_become_float32():
    for rewards_PG in (jnp.array([[1, 0]]), np.array([[True, False]])):
        for advantage in ADVANTAGES.values():
            assert advantage(rewards_PG).dtype == jnp.float32
