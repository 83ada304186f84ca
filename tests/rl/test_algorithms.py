"""The rows, end to end: losses by hand, and values recorded from other systems."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from rl.algorithms import ALGORITHMS, Algorithm, algorithms, get_algorithm
from rl.divergences import Divergence, k3, unbiased_k3


def loss(row: Algorithm, logprobs_BT, old_BT, reference_BT, advantages_B, mask_BT):
    ratio_BT = row.ratio(logprobs_BT, old_BT, mask_BT)
    per_token_BT = -row.surrogate(ratio_BT, advantages_B[:, None])[0]
    if row.divergence is not None:
        per_token_BT += row.divergence.coefficient * row.divergence.estimator(
            logprobs_BT, reference_BT, ratio_BT
        )
    return row.aggregate.total(per_token_BT, mask_BT) / row.aggregate.weight(mask_BT)


# Three sequences of lengths 4, 3, 2, with one token past a clip bound on either side (+0.60,
# -0.40). Losses and gradient norms recorded in float64.
PADDING = -7.0  # never read
OLD = jnp.array([[-0.5, -1.0, -0.2, -2.0], [-0.7, -0.1, -1.5, -0.9], [-1.2, -0.4, -0.3, -0.6]])
LOGPROBS = OLD + jnp.array(
    [[0.10, -0.30, 0.25, 0.50], [-0.40, 0.05, 0.35, -0.10], [0.60, -0.20, 0.0, 0.15]]
)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
ADVANTAGES = jnp.array([1.0, -1.0, 0.5])
RECORDED = 3e-7  # absolute: a few float32 roundings of terms of size 1


def clip_higher(name: str, max_completion: int = 4) -> Algorithm:
    """The row with the clip and without the KL of the recorded values."""
    surrogate = algorithms(1)["dapo"].surrogate
    return dataclasses.replace(
        get_algorithm(name, max_completion=max_completion, kl_weight=0), surrogate=surrogate
    )


def with_kl(estimator) -> Algorithm:
    return dataclasses.replace(clip_higher("grpo"), divergence=Divergence(estimator, 0.04))


# name: (row, loss, norm of its gradient)
GOLDEN = {
    "token-mean (verl vanilla, TRL dapo, OpenRLHF)": (clip_higher("dapo"), -0.24277954, 0.24985719),
    "seq-mean-token-mean (verl, TRL grpo)": (clip_higher("grpo"), -0.17868903, 0.23548543),
    "seq-mean-token-sum (verl)": (clip_higher("rloo"), -0.72833862, 0.74957158),
    "seq-mean-token-sum-norm, width 4 (verl, TRL dr_grpo)": (
        clip_higher("dr_grpo"),
        -0.18208466,
        0.18739290,
    ),
    "TRL grpo with 0.04 k3": (with_kl(k3), -0.17587323, 0.23707105),
    "TRL grpo with 0.04 unbiased k3": (with_kl(unbiased_k3), -0.17434780, 0.23792376),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_losses(name):
    row, value, norm = GOLDEN[name]
    got, slope_BT = jax.value_and_grad(lambda x: loss(row, x, OLD, OLD - 0.1, ADVANTAGES, MASK))(
        LOGPROBS
    )
    assert float(got) == pytest.approx(value, abs=RECORDED)
    assert float(jnp.linalg.norm(slope_BT)) == pytest.approx(norm, abs=RECORDED)


# One prompt, two completions: "right" of two tokens, "wrong" of one. Rewards 1 and 0.
#   ratios                      1.5, 1.0   |  1.25
#   GRPO advantages             +-0.5 / (sqrt(0.5) + 1e-6) = +-a, a = 0.70710578
#   Dr.GRPO advantages         +-0.5
HAND_OLD = jnp.log(jnp.array([[0.4, 0.5], [0.4, 1.0]]))
HAND_LOGPROBS = jnp.log(jnp.array([[0.6, 0.5], [0.5, 1.0]]))
HAND_REFERENCE = jnp.log(jnp.array([[0.3, 0.5], [0.5, 1.0]]))
HAND_MASK = jnp.array([[True, True], [True, False]])
HAND_REWARDS = jnp.array([[1.0, 0.0]])
A = 0.70710578


def hand_loss_and_gradient(row):
    advantages_B = row.advantage(HAND_REWARDS).reshape(-1)
    return jax.value_and_grad(
        lambda x: loss(row, x, HAND_OLD, HAND_REFERENCE, advantages_B, HAND_MASK)
    )(HAND_LOGPROBS)


def test_grpo_by_hand():
    """Surrogates 1.2 a (clipped), a, and -1.25 a. k3 of the first token, where reference / policy
    is 1/2, is 1/2 + log 2 - 1 with slope 1 - 1/2; others 0.
    """
    value, slope_BT = hand_loss_and_gradient(get_algorithm("grpo", max_completion=9))
    surrogate = ((1.2 * A + A) / 2 - 1.25 * A) / 2
    divergence = ((0.19314718 + 0) / 2 + 0) / 2
    assert float(value) == pytest.approx(-surrogate + 0.04 * divergence, abs=RECORDED)
    expected_BT = [[0 + 0.04 * 0.5 / 4, -1.0 * A / 4], [1.25 * A / 2, 0]]
    np.testing.assert_allclose(slope_BT, expected_BT, atol=RECORDED)


def test_dr_grpo_by_hand():
    """Surrogates 0.6 (clipped), 0.5 and -0.625, all over a longest completion of 4, over two rows.
    No KL.
    """
    value, slope_BT = hand_loss_and_gradient(get_algorithm("dr_grpo", max_completion=4))
    assert float(value) == pytest.approx(-(0.6 + 0.5 - 0.625) / 4 / 2, abs=RECORDED)
    np.testing.assert_allclose(slope_BT, [[0, -0.5 / 8], [0.625 / 8, 0]], atol=RECORDED)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_value_and_gradient_do_not_depend_on_padding(name, kl_weight):
    row = get_algorithm(name, max_completion=4, kl_weight=kl_weight)
    padding = ((0, 1), (2, 3))
    value, slope_BT = jax.value_and_grad(lambda x: loss(row, x, OLD, OLD - 0.1, ADVANTAGES, MASK))(
        LOGPROBS
    )
    old_BT, logprobs_BT = (
        jnp.pad(x, padding, constant_values=junk) for x, junk in ((OLD, PADDING), (LOGPROBS, -40.0))
    )
    advantages_B, mask_BT = jnp.pad(ADVANTAGES, (0, 1), constant_values=3.0), jnp.pad(MASK, padding)
    padded, padded_slope_BT = jax.value_and_grad(
        lambda x: loss(row, x, old_BT, old_BT - 0.1, advantages_B, mask_BT)
    )(logprobs_BT)
    assert float(padded) == pytest.approx(float(value), abs=RECORDED)
    np.testing.assert_allclose(padded_slope_BT, jnp.pad(slope_BT, padding), atol=RECORDED)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_gradient_is_reinforce(name):
    """At ratio 1 every row is a weighted REINFORCE: the gradient of a token is its advantage, times
    a weight that depends on the mask alone.
    """
    row = get_algorithm(name, max_completion=4, kl_weight=0)
    slope_BT = jax.grad(lambda x: loss(row, x, OLD, OLD, ADVANTAGES, MASK))(OLD)
    weights_BT = jax.grad(
        lambda values: row.aggregate.total(values, MASK) / row.aggregate.weight(MASK)
    )(OLD)
    np.testing.assert_allclose(slope_BT, -ADVANTAGES[:, None] * weights_BT, rtol=1e-6)
    assert (np.asarray(slope_BT) != 0).sum() == 9


def test_kl_weight_of_the_config():
    """-1 keeps the row's own; 0 turns it off; a number replaces it, in rows whose paper has none
    too.
    """
    assert get_algorithm("grpo", max_completion=4).divergence == Divergence(k3, 0.04)
    assert get_algorithm("grpo", max_completion=4, kl_weight=0).divergence is None
    assert get_algorithm("grpo", max_completion=4, kl_weight=0.1).divergence == Divergence(k3, 0.1)
    assert get_algorithm("dr_grpo", max_completion=4).divergence is None
    assert get_algorithm("dr_grpo", max_completion=4, kl_weight=0.1).divergence == Divergence(
        unbiased_k3, 0.1
    )


@pytest.mark.parametrize(
    "name, near",
    [("drgrpo", "dr_grpo"), ("GRPO", "grpo"), ("Dr_GRPO", "dr_grpo"), ("dapo2", "dapo")],
)
def test_an_unknown_row_suggests_the_nearest(name, near):
    with pytest.raises(UserError, match=f"reinforce.algorithm = '{name}': did you mean '{near}'"):
        get_algorithm(name, max_completion=4)


def test_an_unknown_row_far_from_all_lists_them():
    with pytest.raises(UserError, match=r"reinforce.algorithm = 'zzz': .*grpo, dr_grpo"):
        get_algorithm("zzz", max_completion=4)
