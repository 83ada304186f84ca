"""Rotary positions: relative, in two layouts, stretched by YaRN, over a part of the channels."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.layers.rope import frequencies, rope_angles, rotate, rotate_halves, rotate_interleaved
from tests import tiny

WIDTH = 8
ROPE = tiny.MODEL.rope


def rotated(rotate, x_BTNH, shift):
    return rotate(x_BTNH, rope_angles(jnp.arange(x_BTNH.shape[1])[None] + shift, WIDTH, ROPE))


class Rope(chex.TestCase):
    # chex makes `variants` by toolz.curry, which to type checkers is no function.
    @chex.variants(with_jit=True, without_jit=True)  # pyright: ignore[reportCallIssue]
    def test_products_depend_on_distance_alone(self):
        """(R_t q) . (R_s k) is the same when t and s move together, and differs when one does."""
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 3, WIDTH))
        for turn in (rotate_interleaved, rotate_halves):

            def dots(q_shift, k_shift, turn=turn):
                return jnp.einsum(
                    "BTNH,BSNH->BNTS", rotated(turn, q, q_shift), rotated(turn, k, k_shift)
                )

            dots = self.variant(dots)
            here = dots(0, 0)
            chex.assert_trees_all_close(
                dots(17, 17), here, atol=1e-4
            )  # cos and sin of angles up to 22 in float32
            assert jnp.max(jnp.abs(dots(17, 0) - here)) > 0.5

    def test_layouts_are_a_permutation_apart(self):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3, WIDTH))
        evens_first = np.r_[0:WIDTH:2, 1:WIDTH:2]
        chex.assert_trees_all_close(
            rotated(rotate_interleaved, x, 3)[..., evens_first],
            rotated(rotate_halves, x[..., evens_first], 3),
            rtol=1e-6,
        )

    def test_equation(self):
        """arXiv 2104.09864, eq. 34: pair i turns by position * theta ** (-2 i / width)."""
        x = np.random.default_rng(0).normal(size=(1, 5, 1, WIDTH)).astype(np.float32)
        found = rotated(rotate_interleaved, jnp.asarray(x), 0)
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
            1j * np.arange(5)[:, None, None] * 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
        )
        np.testing.assert_allclose(
            found, np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape), atol=1e-5
        )


YARN = dataclasses.replace(
    ROPE, rope_theta=10_000.0, factor=40.0, original_max_position_embeddings=4_096
)


def test_yarn_of_deepseek_v3():
    """Worked by hand for arXiv 2412.19437, section 4.3 (64 channels, s = 40, 4K before): 32 turns
    at channel 10, 1 turn at channel 23.
    """
    plain, stretched = (
        frequencies(64, rope) for rope in (dataclasses.replace(YARN, factor=1.0), YARN)
    )
    ratio = plain / stretched
    np.testing.assert_allclose(ratio[:11], 1.0)
    np.testing.assert_allclose(ratio[23:], 40.0)
    np.testing.assert_allclose(
        1 / ratio[17], 1 - 7 / 13 + 7 / 13 / 40
    )  # channel 17 is 7/13 of the way from 10 to 23
    assert (np.diff(ratio[10:24]) > 0).all()


def test_yarn_ramp_of_parts_of_channels():
    """Without rounding the ramp begins where a channel would turn exactly beta_fast times."""
    rope = dataclasses.replace(YARN, truncate=False)
    first, last = (
        64 * np.log(4_096 / (turns * 2 * np.pi)) / (2 * np.log(10_000)) for turns in (32, 1)
    )
    slowed = (15 - first) / (last - first)
    plain = 10_000 ** (-30 / 64)
    np.testing.assert_allclose(
        frequencies(64, rope)[15], plain * (1 - slowed) + plain / 40 * slowed
    )


def test_yarn_ramp_may_end_beyond_the_last_pair():
    """An old context longer than the slowest pair's turn: the ramp, from channel 0, ends at channel
    5 (log(64 / 2 pi) * 8 / (2 log 10) = 4.03, up to a whole one), and there are only four pairs.
    """
    rope = dataclasses.replace(
        YARN, rope_theta=10.0, original_max_position_embeddings=64, factor=4.0
    )
    plain = frequencies(8, dataclasses.replace(rope, factor=1.0))
    np.testing.assert_allclose(frequencies(8, rope) / plain, [1.0, 0.85, 0.7, 0.55])


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_the_first_channels_turn(interleaved):
    """Partial RoPE: the rest is as it was; YaRN's scale multiplies what turns."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 3, WIDTH + 6))
    angles = rope_angles(jnp.arange(6)[None] + 3, WIDTH, ROPE)
    turned = rotate(
        x, angles, dataclasses.replace(ROPE, attention_factor=1.25), interleaved=interleaved
    )
    np.testing.assert_array_equal(turned[..., WIDTH:], x[..., WIDTH:])
    whole = (rotate_interleaved if interleaved else rotate_halves)(x[..., :WIDTH], angles)
    np.testing.assert_allclose(turned[..., :WIDTH], 1.25 * whole, atol=1e-6)
    np.testing.assert_array_equal(rotate(x, angles[..., :0], ROPE, interleaved=interleaved), x)
