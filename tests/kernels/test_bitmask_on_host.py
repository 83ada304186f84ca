"""What the host reads and writes is the bitmask of the devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bitmask import keys_on_host, pack, pack_on_host, unpack


@pytest.mark.parametrize("keys", [1, 61, 128, 4_096, 9_000])
def test_the_host_and_the_devices_have_one_layout(keys):
    """Rows with no key, one, a few, a half and all; among them the bit of the sign."""
    shares = np.asarray([0, 1.5 / keys, 0.05, 0.5, 1])
    mask_RS = np.random.default_rng(0).random((5, keys)) < shares[:, None]
    row, key = np.nonzero(mask_RS)
    bits_RW = np.asarray(pack(jnp.asarray(mask_RS)))
    for found, expected in zip(keys_on_host(bits_RW), (row, key), strict=True):
        np.testing.assert_array_equal(found, expected)
    packed_RW = pack_on_host(row, key, 5, keys)
    np.testing.assert_array_equal(packed_RW, bits_RW)
    np.testing.assert_array_equal(unpack(jnp.asarray(packed_RW), keys), mask_RS)
