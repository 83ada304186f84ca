"""The TPU's own compiler takes the decoding kernels, for every chip, at DeepSeek-V3.2's sizes, and
a decode step with them in it copies no cache. Compiled, not run, as test_tpu_kernels.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiment.config_files import get_config
from experiment.schema import build
from kernels.decode_selection import select_tpu
from kernels.sparse_decode import decode_tpu
from model.cache import Cache
from model.config import ModelConfig
from model.decode import decode_weights, jitted_step
from model.mesh import MESH_AXES
from model.sharding import RULES, Named, spec
from model.transformer import init
from plan.topology import topology_devices

pytestmark = pytest.mark.compile

CHIPS, V4 = (
    ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
    "v4:2x2x1",
)  # a v4's 16 MiB of vector memory are enough for decoding
I, C, R, V, TOPK = 64, 128, 576, 512, 2_048
BF16, F32 = jnp.bfloat16, jnp.float32
MIB = 2**20


@functools.cache
def mesh_of(topology: str, tensor: int = 1) -> Mesh:
    devices = np.array(topology_devices(topology)[:tensor]).reshape(1, 1, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)


def compiled(topology: str, function, *shapes):
    """For one device of a topology; `shapes`: (shape, dtype) of each argument."""
    mesh = mesh_of(topology)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize(
    ("heads", "parts", "S", "topology"),
    [
        *((*case, chip) for case in ((128, 1, 4_096), (16, 1, 32_768)) for chip in CHIPS),
        *((128, 2, 131_072, chip) for chip in (V4, *CHIPS)),
    ],
)
def test_sparse_decode(heads, parts, S, topology):
    B = 3 - parts
    program = compiled(
        topology,
        lambda q, tiles, index, count: decode_tpu(q, tiles, V, index, count, num_splits=parts),
        ((B, heads, R), BF16),
        ((B, S, 3, 2, 128), BF16),
        ((B, TOPK), jnp.int32),
        ((B,), jnp.int32),
    )
    assert program.memory_analysis().temp_size_in_bytes < 2 * MIB, (
        "no copy of the cache, not even of what is read of it"
    )


@pytest.mark.parametrize(
    ("mass", "S", "topology"),
    [
        *((*case, chip) for case in ((0.9, 4_096), (1.0, 32_768)) for chip in CHIPS),
        *((0.9, 131_072, chip) for chip in (V4, *CHIPS)),
    ],
)
def test_selection_of_one_query(mass, S, topology):
    shapes = ((2, I, C), BF16), ((2, S, C), BF16), ((2, I), F32), ((2, S),top_p.bool_)
    program = compiled(topology, functools.partial(select_tpu, topk=TOPK, mass=mass), *shapes)
    assert program.memory_analysis().temp_size_in_bytes < 4 * MIB, (
        "the allowed tokens as words, and no copy of the keys"
    )


def test_at_the_highest_precision_bfloat16_stays_what_it_is():
    """As launch.score --exact sets it for everything: Mosaic refuses a product of bfloat16 at that
    precision, and the list is made by such products.
    """
    shapes = ((2, I, C), BF16), ((2, 4_096, C), BF16), ((2, I), F32), ((2, 4_096), jnp.bool_)
    with jax.default_matmul_precision("highest"):
        compiled("v6e:2x2", functools.partial(select_tpu, topk=TOPK), *shapes)


@pytest.mark.parametrize(
    ("heads", "I", "C", "R", "V", "topk"),
    [
        pytest.param(8, 4, 32, 80, 64, 64, id="base"),
        pytest.param(128, 64, 128, 576, 512, TOPK, id="V3.2", marks=pytest.mark.slow),
    ],
)
def test_in_float32(heads, I, C, R, V, topk):
    """configs/base.py's widths, and what launch.score --exact makes of V3.2."""
    B, S = 2, 16_384
    compiled(
        "v6e:2x2",
        functools.partial(select_tpu, topk=topk),
        ((B, I, C), F32),
        ((B, S, C), F32),
        ((B, I), F32),
        ((B, S), jnp.bool_),
    )
    lists = ((B, topk), jnp.int32), ((B,), jnp.int32)
    compiled(
        "v6e:2x2",
        lambda q, tiles, *lists: decode_tpu(q, tiles, V, *lists),
        ((B, heads, R), F32),
        ((B, S, -(-R // 256), 2, 128), F32),
        *lists,
    )


def v32(layers: int) -> ModelConfig:
    """DeepSeek-V3.2's attention and indexer in a few layers without experts, which are not what is
    asked here.
    """
    config = build(ModelConfig, get_config("configs/deepseek_v32.py").model, "config.model")
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        mlp_only_layers=(),
        num_nextn_predict_layers=0,
        dtype="bfloat16",
    )


def decode_step_of(mesh: Mesh, config: ModelConfig, rows: int, slots: int):
    """(the compiled step, its cache)"""

    def placed(leaf, sharding: P):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, sharding))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        named = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        boxed = functools.partial(jax.tree.map, is_leaf=lambda leaf: isinstance(leaf, Named))
        variables = boxed(lambda leaf: placed(leaf.value, spec(*leaf.names)), named)
        weights = (
            jax.jit(lambda variables: decode_weights(config, variables, rows))
            .lower(variables)
            .compile()
        )
        held = jax.eval_shape(lambda variables: decode_weights(config, variables, rows), variables)
        held = jax.tree.map(
            lambda leaf, sharding: placed(leaf, sharding.spec), held, weights.output_shardings
        )
        cache = jax.eval_shape(lambda: Cache.empty(config, rows, slots, "sparse", 0.9))
        cache = jax.tree.map(
            lambda leaf: placed(leaf, P(RULES["batch"]) if leaf.ndim else P()), cache
        )
        tokens = placed(jax.ShapeDtypeStruct((rows,), jnp.int32), P(RULES["batch"]))
        program = jitted_step(config, "sparse").lower(held, tokens, cache).compile()
    return program, cache


def test_a_decode_step_copies_no_cache():
    """Rows of 128K slots, heads over four chips."""
    rows, slots = 4, 131_072
    program, cache = decode_step_of(mesh_of("v6e:2x2", tensor=4), v32(layers=2), rows, slots)
    assert cache.layers[0].attention.latent_BSR.shape == (rows, slots, 3, 2, 128), (
        "tiles, since it is compiled for a TPU"
    )
    text = program.as_text()
    assert "sparse_decode" in text and "decode_select" in text and " sort(" not in text
    one = rows * slots * C * 2  # the smaller of a layer's two arrays, the indexer's keys: 128 MiB
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < one // 2, "some weights in another layout, no cache"
    assert memory.alias_size_in_bytes >= sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers)
    ), "each is written in place"
