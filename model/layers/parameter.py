"""Declares parameters: shape, names of the axes, and what others must know about them."""

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from model.adapters import COLLECTION, adapted
from model.sharding import ParameterUse, named


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    per_channel: bool = False,
    keep_float32: bool = False,
    input_axes: int = 1,
) -> Array:
    """Declares a float32 parameter of a module and returns its value, its adapter added.

    Args:
      name: its name in the collection "params". With the module's path it is the name in
        checkpoints: changing it makes them unreadable.
      axes: a logical name for each axis of `shape`, rows of `model.sharding.RULES`.
      per_channel, keep_float32, input_axes: see `model.sharding.ParameterUse`.
    """
    use = ParameterUse(per_channel, keep_float32, input_axes)
    value = cast(Array, module.param(name, named(init, axes, use), shape, jnp.float32))
    if not module.has_variable(COLLECTION, name):
        return value
    return adapted(value, module.get_variable(COLLECTION, name))


def replayed(module: nn.Module, name: str) -> Array | None:
    """Returns what a layer is to do again of a record (model/record.py), or None."""
    if not module.has_variable("replay", name):
        return None
    return module.get_variable("replay", name)
