"""Keys in four bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.attention.int4 import LEVELS, dequantise, quantise


@pytest.mark.parametrize(("width", "size"), [(64, 64), (80, 64), (12, 4), (5, 8)])
def test_a_channel_is_off_by_half_a_step_at_most(width, size):
    x = np.random.default_rng(0).normal(size=(3, 7, width)).astype(np.float32)
    keys = quantise(jnp.asarray(x), size)
    assert keys.code.dtype == jnp.uint8 and keys.code.shape == (3, 7, -(-width // size), size // 2)
    back = np.asarray(dequantise(keys, width))
    for first in range(0, width, size):
        group, found = x[..., first : first + size], back[..., first : first + size]
        step = (group.max(axis=-1) - group.min(axis=-1)) / LEVELS
        assert np.all(np.abs(group - found) <= step[..., None] * 0.5001), (
            "half a step, and float32's rounding"
        )
        np.testing.assert_allclose(found.min(axis=-1), group.min(axis=-1))
        np.testing.assert_allclose(found.max(axis=-1), group.max(axis=-1), atol=1e-6)


def test_of_equal_channels_nothing_is_lost():
    x = jnp.full((2, 16), 0.3, jnp.bfloat16)
    np.testing.assert_array_equal(dequantise(quantise(x, 16), 16), x)


def test_bfloat16_takes_36_bytes_of_128():
    keys = quantise(jnp.ones((64,), jnp.bfloat16), 64)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in (keys.code, keys.low, keys.step)) == 36
