"""FLOPs are counted as often as they run, and agree with the formula where nothing is wasted."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul import Tiles, megablox
from model.experts import table
from model.sharding import make_mesh
from plan.flops import attended_keys, program_flops
from plan.programs import train_program
from tests.plan.small_config import make_config


def test_flops_count_loops_recomputation_and_devices():
    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    once = 2 * 4 * 8 * 8

    def layers(w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    def recomputed(w):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0])

    assert program_flops(jax.make_jaxpr(layers)(w)) == (3 * once, 0)
    assert program_flops(jax.make_jaxpr(jax.grad(layers))(w)).dense == 9 * once
    assert program_flops(jax.make_jaxpr(jax.grad(recomputed))(w)).dense == 12 * once
    loop = jax.make_jaxpr(
        lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w[0], x)
    )(x)
    assert program_flops(loop, trip_count=5).dense == 5 * once
    mesh = Mesh(jax.devices(), ("x",))
    each = jax.shard_map(
        lambda x: x @ w[0], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    assert program_flops(jax.make_jaxpr(each)(x)).dense == 8 * once


def test_flops_of_a_grouped_matmul_and_its_gradients():
    """Forward, to x and to w: rows x D x F x 2 each, whatever the tiles."""
    x, w, sizes = jnp.ones((256, 8)), jnp.ones((3, 8, 4)), jnp.array([4, 2, 6])

    def loss(x, w):
        return jnp.sum(jnp.square(megablox(x, w, sizes, Tiles(128))))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w)
    assert program_flops(jaxpr) == (0, 3 * 2 * 256 * 8 * 4)


def test_flops_of_the_experts():
    """A gate, an up and a down projection, each with its two gradients."""
    x, w, down = jnp.ones((64, 8)), jnp.ones((3, 8, 4)), jnp.ones((3, 4, 8))
    experts, gates = jnp.zeros((64, 4), int), jnp.ones((64, 4))
    mixture = table.pick("megablox", "tpu", 256, 3)

    def loss(x, w, down):
        return jnp.sum(mixture(x, experts, gates, w, w, down) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, w, down)
    # Each of the three groups may leave its last tile all but empty.
    slots = 128 * ((256 + 3 * 127) // 128)
    assert program_flops(jaxpr) == (0, 3 * 3 * 2 * slots * 8 * 4)


def test_flops_of_a_kernel_that_states_no_cost():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    block = pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0))
    square = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((5, 8, 8), jnp.float32),
        grid=(5,),
        in_specs=[block],
        out_specs=block,
    )
    jaxpr = jax.make_jaxpr(square)(jnp.ones((5, 8, 8)))
    assert program_flops(jaxpr) == (5 * 2 * 8 * 8 * 8, 0)


@pytest.mark.parametrize("stage, mtp_weight", [("dense", 0.3), ("sparse", 0.3), ("dense", 0.0)])
def test_formula_and_program_agree_where_nothing_is_wasted(stage, mtp_weight):
    """Without experts, recomputed layers and a long context, a step does what the formula says, and
    the masked half of attention, which is small here. The indexer's inputs take no gradient: a
    third of its few parameters' share is less than the formula's.
    """
    config = make_config(
        "model.num_hidden_layers=2",
        "model.first_k_dense_replace=2",
        "model.num_nextn_predict_layers=1",
        "model.vocab_size=512",
        "data.seq_len=16",
        "data.batch_size=2",
        f"train.stage={stage}",
        f"train.mtp_weight={mtp_weight}",
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = train_program(config.model, config.train, config.data, mesh)
        counted = program_flops(program.jitted.trace(*program.arguments).jaxpr)
    assert 0.95 < program.formula_flops / counted.dense <= 1.02 and counted.grouped == 0


def test_attended_keys_are_at_most_topk_each():
    assert attended_keys(range(4), 99) == 1 + 2 + 3 + 4
    assert attended_keys(range(2, 6), 4) == 3 + 4 + 4 + 4
