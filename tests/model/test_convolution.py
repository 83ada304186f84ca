"""The short convolution is a loop over a few tokens, and itself on parts of a row."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.layers.convolution import Canon
from tests import tiny

KERNEL_SIZE, D = 4, 5


def by_loop(x_BTD, segments_BT, kernel_KD) -> np.ndarray:
    y_BTD = np.array(x_BTD, np.float64)
    for b, t in np.ndindex(*segments_BT.shape):
        for k in range(len(kernel_KD)):
            if t >= k and segments_BT[b, t - k] == segments_BT[b, t]:
                y_BTD[b, t] += kernel_KD[k] * x_BTD[b, t - k]
    return y_BTD


def convolved(kernel_KD, *inputs) -> tuple[jax.Array, jax.Array]:
    """What the convolution gives for x_BTD, segments_BT and maybe the inputs before: y_BTD, and the
    most recent inputs.
    """
    given = Canon(KERNEL_SIZE).apply({"params": {"taps": kernel_KD}}, *inputs)
    return cast(tuple[jax.Array, jax.Array], given)


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    segments_BT = np.asarray(tiny.batch_of()["segments"])
    return (
        rng.normal(size=(*segments_BT.shape, D)).astype(np.float32),
        segments_BT,
        rng.normal(size=(KERNEL_SIZE, D)).astype(np.float32),
    )


def test_is_the_loop_inside_each_segment(drawn):
    x_BTD, segments_BT, kernel_KD = drawn
    y_BTD, _ = convolved(kernel_KD, x_BTD, segments_BT)
    np.testing.assert_allclose(
        y_BTD, by_loop(*drawn), atol=1e-5
    )  # four products of size 1 in float32


@pytest.mark.parametrize("cuts", [(12,), (1, 2, 3), tuple(range(1, 24))], ids=str)
def test_parts_of_a_row_are_the_row(drawn, cuts):
    """Rows of one segment, however short the parts: shorter than the kernel too."""
    x_BTD, segments_BT, kernel_KD = drawn
    ones_BT = np.ones_like(segments_BT)
    whole_BTD, whole_recent_BPD = convolved(kernel_KD, x_BTD, ones_BT)
    recent_BPD, found = None, []
    for x_BCD in np.split(x_BTD, cuts, axis=1):
        y_BCD, recent_BPD = convolved(kernel_KD, x_BCD, ones_BT[:, : x_BCD.shape[1]], recent_BPD)
        assert recent_BPD.shape == (len(x_BTD), KERNEL_SIZE - 1, D)
        found.append(y_BCD)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole_BTD, atol=1e-5)
    np.testing.assert_array_equal(recent_BPD, whole_recent_BPD)


def test_recent_inputs_stop_at_the_segment(drawn):
    x_BTD, _, kernel_KD = drawn
    segments_BT = np.asarray(
        [[0] * 23 + [1], [0] * 22 + [1] * 2, [1] * 21 + [2] * 3, [1] * 24], np.int32
    )
    _, recent_BPD = convolved(kernel_KD, x_BTD, segments_BT)
    reach = [1, 2, 3, 3]
    for row, count in enumerate(reach):
        assert not np.any(recent_BPD[row, : 3 - count])
        np.testing.assert_array_equal(recent_BPD[row, 3 - count :], x_BTD[row, 24 - count :])


def test_starts_uniform():
    kernel_KD = jax.jit(Canon(KERNEL_SIZE).init)(
        jax.random.key(0), jnp.zeros((1, 2, 5000)), jnp.ones((1, 2), jnp.int32)
    )["params"]["taps"].value
    assert (
        float(jnp.max(jnp.abs(kernel_KD))) <= 0.5
        and abs(float(jnp.std(kernel_KD)) - 1 / 12**0.5) < 0.01
    )  # of uniform in +-1/2; 20,000 draws


@pytest.mark.parametrize("size", [-1, 1])
def test_a_kernel_of_one_token_is_refused(size):
    with pytest.raises(UserError, match=f"model.canon_kernel_size = {size}: must be 0"):
        tiny.model_config(canon_kernel_size=size)
