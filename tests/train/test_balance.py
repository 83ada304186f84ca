"""The router's bias falls for overloaded experts, by the counts of its own layer."""

import jax.numpy as jnp
import numpy as np

from tests import tiny
from train.balance import update_router, updated_bias


def test_overloaded_experts_fall_and_underloaded_rise():
    """The mean load is 4. A bias moves by the sign alone, and not where the load is the mean."""
    bias_LE = jnp.asarray([[0.0, 0.5, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0]])
    # A layer that no real token reached stays.
    counts_LE = jnp.asarray([[9, 4, 0, 3], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        updated_bias(bias_LE, counts_LE, 0.1), [[-0.1, 0.5, 0.1, -0.4], [0, 0, 0, 0]], atol=1e-7
    )


def test_every_layer_reads_its_own_counts():
    """Counts have the dense layer's zeros first, then the MoE layers', then the MTP module's; a
    pass without MTP leaves its bias.
    """
    config = tiny.model_config()
    router = tiny.variables(config)["router"]
    counts_LE = jnp.asarray([[0, 0, 0, 0], [8, 0, 2, 2], [0, 8, 2, 2], [2, 2, 8, 0]])
    moved = update_router(config, router, counts_LE, 0.5)

    def change(*path):
        new, old = moved, router
        for name in (*path, "moe", "bias"):
            new, old = new[name], old[name]
        return np.asarray(new - old)

    np.testing.assert_allclose(
        change("layers_1", "block_0"), [[-0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, 0.5]], atol=1e-6
    )
    np.testing.assert_allclose(change("mtp_0", "block"), [0.5, 0.5, -0.5, 0.5], atol=1e-6)
    moved = update_router(config, router, counts_LE[:3], 0.5)
    np.testing.assert_array_equal(change("mtp_0", "block"), np.zeros(4))


def test_a_model_without_experts_has_no_router():
    config = tiny.model_config(first_k_dense_replace=3, num_nextn_predict_layers=0)
    assert update_router(config, {}, jnp.zeros((3, 4)), 0.5) == {}
