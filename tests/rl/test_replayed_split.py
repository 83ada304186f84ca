"""A loss that does again what was recorded does not depend on how its batch is cut: microbatches,
and a mesh of eight pretended devices.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from model.mesh import MeshConfig
from model.sharding import batch_sharding, make_mesh
from tests import tiny
from tests.model.test_replay import others, record
from tests.train.test_sharding import (
    CONFIGS,
    TOLERANCE,
    objective_and_batch,
    placed_state,
)
from train.step import loss_and_gradient

CONFIG = CONFIGS["reinforce"]
ONE = MeshConfig(data=1, fsdp=1, expert=1, tensor=1)
EIGHT = MeshConfig(data=2, fsdp=1, expert=2, tensor=2)


@functools.cache
def program(mesh_config: MeshConfig, microbatches: int):
    objective, _ = objective_and_batch(CONFIG, "grpo")

    def run(state, batch):
        learns = jax.tree.map(lambda _: True, state.params)
        gradients, means, totals = loss_and_gradient(objective, learns, state, batch, microbatches)
        return gradients, means, totals.counts_LE

    return jax.jit(run)


@functools.cache
def computed(mesh_config: MeshConfig = ONE, microbatches: int = 1, recorded: str = "others"):
    """Gradients and terms of packed and padded rows, with what a model chose for them: another or
    the model itself.
    """
    batch, variables = objective_and_batch(CONFIG, "grpo")[1], tiny.variables(CONFIG)
    _, routes, selected = record(
        CONFIG, others(variables) if recorded == "others" else variables, batch
    )
    batch |= {"routes": routes, "selected": selected}
    mesh = make_mesh(mesh_config, jax.devices()[: 1 if mesh_config == ONE else 8])
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_sharding(mesh))
        run = program(mesh_config, microbatches)
        return jax.device_get(run(placed_state(CONFIG, mesh), placed))


@pytest.mark.heavy
def test_microbatches_do_the_same_again():
    tiny.assert_close(computed(microbatches=4), computed(), **TOLERANCE)


@pytest.mark.mesh
def test_microbatches_on_a_mesh_do_the_same_again():
    """Rows over data and experts, heads over tensor."""
    tiny.assert_close(computed(EIGHT, microbatches=2), computed(), **TOLERANCE)


@pytest.mark.heavy
def test_the_record_is_what_is_done():
    """With another, experts and keys are others: lost in a part, the tests above would fail."""
    (gradients, _, counts), (own, _, own_counts) = computed(), computed(recorded="own")
    assert tiny.tree_max(jax.tree.map(jnp.subtract, gradients, own)) > 1e-2
    assert (counts != own_counts).any()
