"""Everything a run is, but for its place in the data.

It is what a checkpoint saves and what a step maps to the next.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from kernels.device import compiler_options
from model.adapters import COLLECTION, scaled
from model.config import ModelConfig
from model.sharding import is_named, replicated, shardings
from model.transformer import boxed_shapes, init


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    step: int32, steps taken, skipped ones included.
    params: float32.
    router: the router biases, which are no parameters: no gradient reaches them.
    opt_state: of the optimizer.
    skipped: int32, steps that changed nothing, in all: their gradients were not finite, or their
      batch had nothing to learn from.
    skipped_in_row: int32, those since the last step with finite gradients.
    """

    step: Array
    params: dict
    router: dict
    opt_state: optax.OptState
    skipped: Array
    skipped_in_row: Array

    @property
    def variables(self) -> dict:
        """The collections of variables that the model is applied with."""
        return self.variables_with(self.params)

    def variables_with(self, params: dict) -> dict:
        """Returns `variables` with these in place of the parameters that learn."""
        return {"params": params, "router": self.router}

    @property
    def learnt(self) -> "TrainState":
        """What changes from step to step: what a step donates and a checkpoint saves."""
        return self

    def with_learnt(self, learnt: "TrainState") -> "TrainState":
        """Returns the state with another `learnt`."""
        return learnt


@flax.struct.dataclass
class StateWithCritic(TrainState):
    """The state of a run with a critic that learns beside the policy (rl/critic.py).

    critic: the critic's state; its steps are its updates.
    """

    critic: TrainState

    @property
    def policy(self) -> TrainState:
        """The state of the policy alone."""
        fields = (field.name for field in dataclasses.fields(TrainState))
        return TrainState(**{name: getattr(self, name) for name in fields})

    @classmethod
    def of(cls, policy: TrainState, critic: TrainState) -> "StateWithCritic":
        """Returns the state of both."""
        return cls(**vars(policy), critic=critic)


@flax.struct.dataclass
class StateOverBase(TrainState):
    """The state of a run whose parameters are frozen, and adapters over them learn (train/lora.py).

    params: the adapters, {"a", "b"} in place of each adapted matrix, unscaled.
    base: {"params", "router"} that the run started from. No step donates or changes them, and no
      checkpoint has them: the workdir keeps them once (train/base.py).
    scale: what the product of an adapter's factors is multiplied by.
    """

    base: dict
    scale: float = flax.struct.field(pytree_node=False)

    @functools.cached_property
    def variables(self) -> dict:
        """The base with the adapters; the same arrays however often it is asked for."""
        return self.variables_with(self.params)

    def variables_with(self, params: dict) -> dict:
        """Returns the base with these adapters, as model/adapters.py has them."""
        added = {COLLECTION: scaled(params, self.scale)}
        return {"params": self.base["params"], "router": self.router} | added

    @property
    def learnt(self) -> TrainState:
        """The state but for the base."""
        fields = (field.name for field in dataclasses.fields(TrainState))
        return TrainState(**{name: getattr(self, name) for name in fields})

    def with_learnt(self, learnt: TrainState) -> "StateOverBase":
        """Returns the state with another `learnt`, over the same base."""
        return StateOverBase.of(learnt, self.base, self.scale)

    @classmethod
    def of(cls, learnt: TrainState, base: dict, scale: float) -> "StateOverBase":
        """Returns the state of adapters over a base."""
        return cls(**vars(learnt), base=base, scale=scale)


def first_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run that has taken no step yet."""
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
    """Draws a new state on the default device."""
    return first_state(nn.meta.unbox(init(config, key)), optimizer)


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    boxed: dict[str, Any] | None = None,
) -> TrainState:
    """Returns shapes, types and shardings of the state, with nothing allocated.

    An optimizer moment is sharded as its parameter.

    Args:
      boxed: the shapes of the variables in their boxes, where they are not `boxed_shapes` of the
        model.
    """
    boxed = boxed_shapes(config) if boxed is None else boxed
    where, shapes = shardings(boxed, mesh), nn.meta.unbox(boxed)
    everywhere = replicated(mesh)
    # As a leaf of the state it stands for an array.
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    sharding_of = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(where["params"])
    }

    def sharded(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def moment(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # An optimizer wraps the tree of parameters in tuples and, where it groups them, in
        # dictionaries: the parameter's own path ends the moment's.
        names = _names(path)
        ends = (names[start:] for start in range(len(names)))
        return sharded(
            leaf, next((sharding_of[end] for end in ends if end in sharding_of), everywhere)
        )

    moments = jax.tree_util.tree_map_with_path(
        moment, jax.eval_shape(optimizer.init, shapes["params"])
    )
    params, router = (
        jax.tree.map(sharded, shapes[kind], where[kind]) for kind in ("params", "router")
    )
    return TrainState(count, params, router, moments, skipped=count, skipped_in_row=count)


def _names(path: Any) -> tuple[str, ...]:
    """Returns the dictionary keys of a path."""
    return tuple(
        key.key
        for key in path
        if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)
    )


def state_shardings(abstract: Any) -> Any:
    """Returns the shardings of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: Array
) -> TrainState:
    """Draws a new state, each shard where it lives."""
    abstract = abstract_state(config, optimizer, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda key: make_state(config, optimizer, key),
            out_shardings=state_shardings(abstract),
            compiler_options=compiler_options(mesh, runs_once=True),
        )(key)


def state_from(
    variables: dict,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    boxed: dict[str, Any] | None = None,
) -> TrainState:
    """Returns a new state with the variables of another run, which are donated.

    Args:
      boxed: as of `abstract_state`.
    """
    abstract = abstract_state(config, optimizer, mesh, boxed)
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda variables: first_state(variables, optimizer),
            out_shardings=state_shardings(abstract),
            donate_argnums=0,
        )(variables)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Returns the number of parameters, (all, active).

    Of the routed experts, active counts the share that a token is sent to. MTP modules count, as
    they are trained, and so does the embedding.
    """
    total = active = 0
    for box in jax.tree.leaves(boxed_shapes(config)["params"], is_leaf=is_named):
        size = box.value.size
        total += size
        routed = "experts" in box.names
        active += (
            size * config.moe.num_experts_per_tok // config.moe.num_experts if routed else size
        )
    return total, active
