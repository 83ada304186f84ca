"""Advantages of single tokens: loops over one trajectory at a time, whatever shares its row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms import returns
from rl.algorithms.experience import Experience

# Rows of (trajectory, tokens): P a prompt's, M the model's, T a tool's, . padding.
ROWS = ((0, "PMMTMM"), (1, "PPMM")), ((2, "PMMMMTTM"),), ((3, "PM"), (4, "PMMM"))
WIDTH = 12
PLAIN = 1e-6  # absolute: float32 sums of some ten numbers of size 1


def laid_out(rows, width: int) -> Experience:
    """Each trajectory's numbers are its own, wherever it stands."""
    N = 5
    shape = len(rows), width
    trajectory_BT, mask_BT = np.full(shape, -1), np.zeros(shape, bool)
    drawn_BT = {name: np.zeros(shape, np.float32) for name in ("values", "old", "reference")}
    for row, content in enumerate(rows):
        start = 0
        for number, roles in content:
            at = slice(start, start + len(roles))
            trajectory_BT[row, at] = number
            mask_BT[row, at] = [role == "M" for role in roles]
            rng = np.random.default_rng(number)
            for x_BT in drawn_BT.values():
                x_BT[row, at] = rng.normal(size=len(roles))
            start += len(roles)
    rewards_N = np.array([1.0, 0.0, -0.5, 2.0, 1.0], np.float32)
    arrays = {
        "rewards_MN": rewards_N[None],
        "weights_M": np.ones(1, np.float32),
        "outcome_N": rewards_N,
        "groups_N": np.array([0, 0, 1, 1, 1]),
        "present_N": np.ones(N, bool),
        "trajectory_BT": trajectory_BT,
        "mask_BT": mask_BT,
        "tokens_BT": np.zeros(shape, np.int32),
        "penalty_BT": 0.1 * drawn_BT["old"],
        "old_BT": drawn_BT["old"],
        "reference_BT": drawn_BT["reference"],
        "values_BT": drawn_BT["values"],
    }
    return Experience(**jax.tree.map(jnp.asarray, arrays))


PACKED = laid_out(ROWS, WIDTH)
ALONE = laid_out([((number, roles),) for row in ROWS for number, roles in row], 8)


def by_trajectory(given: Experience, values_BT) -> dict[int, np.ndarray]:
    """What the tokens that are learnt from have, trajectory by trajectory."""
    trajectory_BT, mask_BT = np.asarray(given.trajectory_BT), np.asarray(given.mask_BT)
    return {n: np.asarray(values_BT)[mask_BT & (trajectory_BT == n)] for n in range(5)}


def token_rewards(given: Experience, number: int) -> np.ndarray:
    earned = -by_trajectory(given, given.penalty_BT)[number]
    earned[-1] += np.asarray(given.outcome_N)[number]
    return earned


@pytest.mark.parametrize("given", [ALONE, PACKED], ids=["alone", "packed"])
def test_a_loop_over_each_trajectory(given):
    """Tools' tokens are passed over."""
    gamma, lam = 0.9, 0.8
    found = jax.jit(returns.generalised(gamma=gamma, lam=lam, whiten=False))(given)
    discounted = jax.jit(returns.discounted(gamma=gamma, whiten=False))(given)
    values = by_trajectory(given, given.values_BT)
    for number, A_T in by_trajectory(given, found.advantages_BT).items():
        rewards_T, V_T = token_rewards(given, number), values[number]
        expected, total, next_value, after, sums = [], 0.0, 0.0, 0.0, []
        for reward, value in zip(rewards_T[::-1], V_T[::-1], strict=True):
            after = reward + gamma * next_value - value + gamma * lam * after
            next_value, total = value, reward + gamma * total
            expected.append(after)
            sums.append(total)
        np.testing.assert_allclose(A_T, expected[::-1], atol=PLAIN)
        R_T = by_trajectory(given, found.returns_BT)[number]
        np.testing.assert_allclose(R_T, np.add(expected[::-1], V_T), atol=PLAIN)
        G_T = by_trajectory(given, discounted.advantages_BT)[number]
        np.testing.assert_allclose(G_T, sums[::-1], atol=PLAIN)
    for x_BT in (found.advantages_BT, found.returns_BT, discounted.advantages_BT):
        np.testing.assert_array_equal(np.asarray(x_BT)[~np.asarray(given.mask_BT)], 0)


@pytest.mark.parametrize("name", returns.RETURNS)
def test_a_layout_does_not_matter(name):
    """Rows of their own, or shared: whitening over all tokens included."""
    found = [
        by_trajectory(given, jax.jit(returns.RETURNS[name]())(given).advantages_BT)
        for given in (ALONE, PACKED)
    ]
    for number in range(5):
        np.testing.assert_allclose(found[0][number], found[1][number], atol=PLAIN)


def test_gae_of_the_recorded_values():
    """The golden values of verl: gamma 1, lambda 0.95, a reward at the end."""
    values = [[0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.2, 0.0], [0.5, 0.4, 0.0, 0.0]]
    lengths = np.array([4, 3, 2])
    inside = np.arange(4) < lengths[:, None]
    given = Experience(
        rewards_MN=jnp.array([[1.0, 0.0, 1.0]]),
        weights_M=jnp.ones(1),
        outcome_N=jnp.array([1.0, 0.0, 1.0]),
        groups_N=jnp.arange(3),
        present_N=jnp.ones(3, bool),
        trajectory_BT=jnp.where(jnp.asarray(inside), jnp.arange(3)[:, None], -1),
        mask_BT=jnp.asarray(inside),
        tokens_BT=jnp.zeros((3, 4), jnp.int32),
        values_BT=jnp.asarray(values),
    )
    found = returns.generalised(gamma=1.0, lam=0.95)(given)
    assert found.returns_BT is not None
    expected = [[0.899675, 0.9365, 0.97, 1], [0.0145, 0.01, 0, 0], [0.97, 1, 0, 0]]
    np.testing.assert_allclose(found.returns_BT, expected, atol=PLAIN)
    whitened = np.asarray(found.advantages_BT)[inside]
    np.testing.assert_allclose([whitened.mean(), whitened.var(ddof=1)], [0, 1], atol=PLAIN)


@pytest.mark.parametrize("name", ["discounted", "generalised", "to_go"])
def test_where_no_outcome_differs_nothing_is_learnt(name):
    """Penalties and values alone would be whitened to full size. The critic learns all the same."""
    equal = dataclasses.replace(PACKED, outcome_N=jnp.full(5, 0.3))
    found = returns.RETURNS[name]()(equal)
    np.testing.assert_array_equal(found.advantages_BT, 0)
    if name == "generalised":
        assert jnp.any(found.returns_BT != 0)


def test_a_teacher_rewards_each_token_alone():
    assert PACKED.reference_BT is not None and PACKED.old_BT is not None
    found = returns.teacher()(PACKED).advantages_BT
    gap_BT = jnp.where(PACKED.mask_BT, PACKED.reference_BT - PACKED.old_BT, 0)
    np.testing.assert_allclose(found, gap_BT, atol=PLAIN)
    whole = by_trajectory(PACKED, returns.teacher(gamma=1.0)(PACKED).advantages_BT)
    for number, gap_T in by_trajectory(PACKED, gap_BT).items():
        np.testing.assert_allclose(whole[number], np.cumsum(gap_T[::-1])[::-1], atol=PLAIN)


def test_remax_token_by_token_subtracts_the_greedy_reward():
    given = dataclasses.replace(PACKED, greedy_N=jnp.arange(5.0))
    plain = by_trajectory(given, returns.to_go()(given).advantages_BT)
    found = by_trajectory(given, returns.to_go(baseline="greedy")(given).advantages_BT)
    for number in range(5):
        np.testing.assert_allclose(found[number], plain[number] - number, atol=PLAIN)
