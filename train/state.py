"""Everything a run is, but for its place in the data: what a checkpoint saves and a step maps to
the next.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from model import transformer
from model.config import ModelConfig
from model.sharding import replicated, shardings


@flax.struct.dataclass
class TrainState:
    step: Array  # steps taken, skipped ones included
    params: dict  # float32
    router: dict  # the router biases: state that is no parameter
    opt_state: optax.OptState
    skipped: Array  # steps without finite gradients, in all
    skipped_in_row: Array

    @property
    def variables(self) -> dict:
        return {"params": self.params, "router": self.router}


@functools.cache
def boxed_shapes(config: ModelConfig) -> dict:
    """Shapes and types of the variables, each with the names of its axes. Kept, because tracing a
    model takes a second and several ask.
    """
    return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


def first_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """No step taken yet."""
    count = jnp.zeros((), jnp.int32)
    return TrainState(
        count,
        variables["params"],
        variables["router"],
        optimizer.init(variables["params"]),
        count,
        count,
    )


def make_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    return first_state(nn.meta.unbox(transformer.init(config, key)), optimizer)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state, with nothing allocated. An optimizer moment is
    sharded as its parameter.
    """
    where, shapes = shardings(boxed_shapes(config), mesh), nn.meta.unbox(boxed_shapes(config))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))

    def sharded(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    everywhere = replicated(mesh)
    of_parameter = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(where["params"])
    }

    def moment(path, leaf):
        # An optimizer wraps the tree of parameters in tuples and, where it groups them, in
        # dictionaries: the parameter's own path ends the moment's.
        names = _names(path)
        found = (
            of_parameter[names[start:]]
            for start in range(len(names))
            if names[start:] in of_parameter
        )
        return sharded(leaf, next(found, everywhere))

    moments = jax.tree_util.tree_map_with_path(
        moment, jax.eval_shape(optimizer.init, shapes["params"])
    )
    params, router = (
        jax.tree.map(sharded, shapes[kind], where[kind]) for kind in ("params", "router")
    )
    return TrainState(count, params, router, moments, skipped=count, skipped_in_row=count)


def _names(path) -> tuple[str, ...]:
    """The dictionary keys of a path."""
    return tuple(
        key.key
        for key in path
        if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)
    )


def state_shardings(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: Array
) -> TrainState:
    """A new state, each shard made where it lives."""
    abstract = abstract_state(config, optimizer, mesh)
    # It runs once: on a CPU, LLVM would spend seconds on what takes a moment (11.5 and 4.3 s for
    # the quickstart's model). Other compilers lack the option.
    options = (
        {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    )
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda key: make_state(config, optimizer, key),
            out_shardings=state_shardings(abstract),
            compiler_options=options,
        )(key)


def state_from(
    variables: dict, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A new state with the variables of another run, which are given away."""
    abstract = abstract_state(config, optimizer, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda variables: first_state(variables, optimizer),
            out_shardings=state_shardings(abstract),
            donate_argnums=0,
        )(variables)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, active): active counts only the chosen share of the routed experts. MTP modules count,
    as they are trained; embedding included.
    """
    params = nn.meta.unbox(boxed_shapes(config))["params"]
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [key.key for key in path]
        routed = "moe" in keys and keys[-1] in ("gate", "up", "down") and "shared" not in keys
        total += leaf.size
        active += (
            leaf.size * config.moe.num_experts_per_tok // config.moe.num_experts
            if routed
            else leaf.size
        )
    return total, active
