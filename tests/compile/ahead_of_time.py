"""Compiling for devices that are not there, and reading what the compiler made."""

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiment.config_files import get_config
from experiment.schema import build
from model.cache import Cache
from model.config import ModelConfig
from model.decode_weights import decode_weights
from model.sharding import MESH_AXES, RULES, is_named, spec
from model.transformer import boxed_shapes
from plan.topology import topology_devices
from tests.tiny import jitted_step

BF16, F32 = jnp.bfloat16, jnp.float32
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@functools.cache
def tpu_mesh(topology: str, tensor: int = 1) -> Mesh:
    """Makes a mesh of the first devices of a topology, all on the axis "tensor"."""
    devices = np.array(topology_devices(topology)[:tensor]).reshape(1, 1, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)


def compiled(target: Mesh | str, function: Callable, *shapes) -> jax.stages.Compiled:
    """Compiles a function for a mesh, or for one device of a topology.

    Args:
      target: the mesh, or the topology's name.
      function: what is compiled.
      *shapes: (shape, dtype) of each argument.
    """
    mesh = tpu_mesh(target) if isinstance(target, str) else target
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile()


def text_of(program: jax.stages.Compiled) -> str:
    """Returns the compiled program as text."""
    text = program.as_text()
    assert text is not None
    return text


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory of a device that a program takes beside arguments and results."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def config_of(name: str) -> ModelConfig:
    """Reads the model's config from configs/."""
    section = cast(ConfigDict, get_config(f"configs/{name}.py")["model"])
    return build(ModelConfig, section, "config.model")


def v32_without_experts(layers: int) -> ModelConfig:
    """Makes DeepSeek-V3.2's attention and indexer in a few layers with dense FFNs."""
    return dataclasses.replace(
        config_of("deepseek_v32"),
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        mlp_only_layers=(),
        num_nextn_predict_layers=0,
        dtype="bfloat16",
    )


def compile_decode_step(mesh: Mesh, config: ModelConfig, rows: int, slots: int):
    """Compiles a decode step in the sparse stage; returns it and the shapes of its cache."""

    def placed(leaf, sharding: P):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, sharding))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        variables = jax.tree.map(
            lambda box: placed(box.value, spec(*box.names)), boxed_shapes(config), is_leaf=is_named
        )
        prepare = jax.jit(lambda variables: decode_weights(config, variables, rows))
        weights = jax.tree.map(
            lambda leaf, sharding: placed(leaf, sharding.spec),
            jax.eval_shape(prepare, variables),
            prepare.lower(variables).compile().output_shardings,
        )
        cache = jax.tree.map(
            lambda leaf: placed(leaf, P(RULES["batch"]) if leaf.ndim else P()),
            jax.eval_shape(lambda: Cache.empty(config, rows, slots, "sparse", 0.9)),
        )
        tokens = placed(jax.ShapeDtypeStruct((rows,), jnp.int32), P(RULES["batch"]))
        program = jitted_step(config, "sparse").lower(weights, tokens, cache).compile()
    return program, cache


def assert_cache_is_written_in_place(program: jax.stages.Compiled, cache: Cache) -> None:
    """Asserts that the step gives back every layer's arrays in the memory that it got them in."""
    memory = program.memory_analysis()
    assert memory is not None
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert memory.alias_size_in_bytes >= arrays
