import chex
import jax
import jax.numpy as jnp
import numpy as np

from model.rope import rope_angles, rotate_halves, rotate_interleaved

WIDTH = 8


def rotated(rotate, x_BTNH, shift):
    return rotate(x_BTNH, rope_angles(jnp.arange(x_BTNH.shape[1])[None] + shift, WIDTH, 100.0))


class Rope(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_products_depend_on_distance_alone(self):
        """(R_t q) . (R_s k) is the same when t and s move together, and differs when one does."""
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 3, WIDTH))
        for rotate in (rotate_interleaved, rotate_halves):

            def dots(q_shift, k_shift, rotate=rotate):
                return jnp.einsum("BTNH,BSNH->BNTS", rotated(rotate, q, q_shift), rotated(rotate, k, k_shift))

            dots = self.variant(dots)
            here = dots(0, 0)
            chex.assert_trees_all_close(dots(17, 17), here, atol=1e-4)  # cos and sin of angles up to 22 in float32
            assert jnp.max(jnp.abs(dots(17, 0) - here)) > 0.5

    def test_layouts_are_a_permutation_apart(self):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3, WIDTH))
        evens_first = np.r_[0:WIDTH:2, 1:WIDTH:2]
        chex.assert_trees_all_close(rotated(rotate_interleaved, x, 3)[..., evens_first], rotated(rotate_halves, x[..., evens_first], 3), rtol=1e-6)

    def test_equation(self):
        """arXiv 2104.09864, eq. 34: pair i turns by position * theta ** (-2 i / width)."""
        x = np.random.default_rng(0).normal(size=(1, 5, 1, WIDTH)).astype(np.float32)
        found = rotated(rotate_interleaved, jnp.asarray(x), 0)
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.arange(5)[:, None, None] * 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
        np.testing.assert_allclose(found, np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape), atol=1e-5)
