"""Rewards shared out by entropy, and tokens in conflict: by hand, and of the authors' code."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms import credit
from rl.algorithms.experience import Experience


def experience(lengths, rewards, entropies=None, ids=None, groups=None) -> Experience:
    """One row a completion, behind a token of a prompt."""
    N, T = len(lengths), max(lengths) + 1
    inside_NT = np.arange(T) <= np.asarray(lengths)[:, None]
    mask_NT = inside_NT & (np.arange(T) > 0)

    def table(rows, fill) -> jnp.ndarray:
        found = np.full((N, T), fill)
        for row, values in enumerate(rows):
            found[row, 1 : 1 + len(values)] = values
        return jnp.asarray(found)

    return Experience(
        rewards_MN=jnp.asarray([rewards], jnp.float32),
        weights_M=jnp.ones(1),
        outcome_N=jnp.asarray(rewards, jnp.float32),
        groups_N=jnp.asarray(np.zeros(N, int) if groups is None else groups),
        present_N=jnp.ones(N, bool),
        trajectory_BT=jnp.where(jnp.asarray(inside_NT), jnp.arange(N)[:, None], -1),
        mask_BT=jnp.asarray(mask_NT),
        tokens_BT=table(ids or [[]] * N, -7),
        entropy_BT=None if entropies is None else table(entropies, 0.0).astype(jnp.float32),
    )


ENTROPIES = [[1, 2, 0.5], [0.5, 1], [2, 1, 1], [1, 0.25]]
REWARDS = [1.0, 1.0, 0.0, 0.0]


def entropic() -> Experience:
    return experience([3, 2, 3, 2], REWARDS, ENTROPIES)


def test_rewards_of_tokens_by_hand():
    """At the first place the right ones have entropies 1 and 1/2, two thirds and one of 2."""
    found = credit.shaped_rewards(entropic(), alpha=0.1, reward=1.0)
    expected = [
        [0, 1.133333, 1.133333, 1.1],
        [0, 1.066667, 1.066667, 0],
        [0, -1.066667, -1.04, -1.1],
        [0, -1.133333, -1.16, 0],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_right_and_wrong_tokens_are_scored_apart():
    given = entropic()
    shaped = np.asarray(credit.shaped_rewards(given, alpha=0.1, reward=1.0))
    found = np.asarray(credit.entropy_tokens()(given).advantages_BT)
    mask = np.asarray(given.mask_BT)
    for rows in (slice(0, 2), slice(2, 4)):
        values = shaped[rows][mask[rows]]
        # Float32 roundings of numbers near 1, over a deviation of 0.03.
        expected = (values - values.mean()) / (values.std() + 1e-6)
        np.testing.assert_allclose(found[rows][mask[rows]], expected, atol=2e-5)
    assert not np.any(found[~mask])


def test_whole_completions_by_hand():
    """Mean entropies 7/6 and 3/4: shares 0.608696 and 0.391304 of the two right ones."""
    found = credit.entropy_sequences()(entropic()).advantages_BT[:, 1]
    np.testing.assert_allclose(found, [1, -1, 1, -1], rtol=1e-4)
    three = experience([3, 2, 3, 1], [1.0, 1.0, 1.0, 0.0], [[1, 2, 0.5], [0.5, 1], [2, 1, 1], [1]])
    means = np.array([7 / 6, 3 / 4, 4 / 3])
    shaped = 1 + 0.1 * means / means.sum() * 3
    expected = (shaped - shaped.mean()) / shaped.std()
    found = credit.entropy_sequences()(three).advantages_BT[:, 1]
    np.testing.assert_allclose(found[:3], expected, rtol=2e-4)
    assert found[3] == 0  # the only wrong one


@pytest.mark.parametrize("name", ["entropy_tokens", "entropy_sequences"])
def test_a_prompt_without_right_and_wrong_teaches_nothing(name):
    for rewards in ([1.0] * 4, [0.0] * 4):
        given = experience([3, 2, 3, 2], rewards, ENTROPIES)
        np.testing.assert_array_equal(credit.CREDITS[name]()(given).advantages_BT, 0)


@pytest.mark.parametrize("name", ["entropy_tokens", "entropy_sequences"])
def test_equal_shares_are_exactly_zero(name):
    same = dataclasses.replace(
        entropic(), entropy_BT=jnp.where(entropic().mask_BT, 0.7, 0.0), groups_N=jnp.arange(4) // 2
    )
    np.testing.assert_array_equal(credit.CREDITS[name]()(same).advantages_BT, 0)


IDS = [[5, 6, 7, 8, 9, 3], [5, 6, 1, 8, 9, 3], [5, 2, 7, 4, 3]]
SIGNS = jnp.array([1.0, -1.0, -1.0])


@pytest.mark.parametrize("form, counts", [("reference", [6, 3, 1]), ("corrected", [6, 5, 2])])
def test_tokens_in_conflict_of_the_authors_code(form, counts):
    """Recorded from it: the weights are those of either form, the counts of one are its bug's."""
    given = experience([6, 6, 5], [1.0, 0.0, 0.0], ids=IDS)
    weights, count = credit.conflict_weights(given, SIGNS, form, 2.0)
    expected = [[2, 2, 2, 4, 4, 4], [0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
    for row, values in enumerate(expected):
        np.testing.assert_array_equal(weights[row, : len(values)], values)
    np.testing.assert_array_equal(count, counts)


def test_prompts_are_not_in_conflict_with_each_other():
    given = experience([2, 2], [1.0, 0.0], ids=[[5, 6], [5, 6]], groups=[0, 1])
    weights, count = credit.conflict_weights(given, jnp.array([1.0, -1.0]), "corrected", 2.0)
    np.testing.assert_array_equal(weights[:, :2], 1)
    np.testing.assert_array_equal(count, 0)


def test_the_advantage_of_conflicts_by_hand():
    """Rewards 1, 0, 0 less 1/3; a tenth of the entropy off; none above 0.7 nats."""
    entropies = [[0.2] * 6, [0.6] * 6, [0.9] * 5]
    given = experience([6, 6, 5], [1.0, 0.0, 0.0], entropies, IDS)
    found = credit.conflicts(form="reference")(given)
    np.testing.assert_allclose(
        found.advantages_BT[:, 1], [2 / 3 - 0.02, -1 / 3 - 0.06, 0.0], atol=1e-6
    )
    assert found.weights_BT is not None
    np.testing.assert_allclose(found.weights_BT[0, 1:], np.array([2, 2, 2, 4, 4, 4]) / 6)
    np.testing.assert_allclose(found.weights_BT[1, 1:], np.array([0, 0, 1, 0, 0, 0]) / 3)
