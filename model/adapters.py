"""LoRA (arXiv 2106.09685): a matrix is read as W + A B, with A and B of low rank.

That is its eq. 3, for inputs on the left of a matrix, as here: h = x W + x A B. Variables with
adapters have a third collection beside "params" and "router":

    {"lora": {"layers_0": {"block_0": {"attention": {"out": {"a": ..., "b": ...}}}}}}

It has the path of each adapted matrix, and there the two factors whose product is added, the scale
alpha / r in "b". A module adds it where it declares the parameter (`model.layers.parameter`), layer
by layer inside the scan, so that no second set of matrices and no gradient of one is ever whole in
memory; `merged` adds it to all at once, for what wants plain parameters.

Which axes of a matrix are inputs and which are outputs its box says (`Named.matrix_axes`):

    W   [layers, experts, *inputs, *outputs]
    A   [layers, experts, *inputs, rank]
    B   [layers, experts, rank, *outputs]
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.sharding import STACKING_AXES, Named, ParameterUse

COLLECTION = "lora"


def product(a: Array, b: Array, ndim: int) -> Array:
    """Returns A B, of the shape of the matrix that it is added to, which has `ndim` axes.

    It is computed in float32 whatever the device does by default.
    """
    stacked = a.ndim + b.ndim - 2 - ndim
    # One more axis of separate matrices, of length 1: of products with such axes `model.remat` =
    # "dots" keeps none for the backward pass.
    batch = tuple(range(stacked + 1))
    return jax.lax.dot_general(
        a[None],
        b[None],
        (((a.ndim,), (stacked + 1,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )[0]


def adapted(matrix: Array, adapter: Mapping[str, Array]) -> Array:
    """Returns W + A B in the type of W."""
    with jax.named_scope("lora"):
        added = product(adapter["a"], adapter["b"], matrix.ndim)
        return (matrix.astype(jnp.float32) + added).astype(matrix.dtype)


def merged(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"params", "router"}, the adapters added to the parameters."""
    plain = {name: tree for name, tree in variables.items() if name != COLLECTION}
    return plain | {"params": _merged(variables["params"], variables.get(COLLECTION, {}))}


def _merged(params: Any, adapters: Any) -> Any:
    if not isinstance(params, Mapping):
        return adapted(params, adapters)
    return {
        name: _merged(tree, adapters[name]) if name in adapters else tree
        for name, tree in params.items()
    }


def scaled(adapters: Any, scale: float) -> Any:
    """Returns adapters as the collection has them: B times the scale.

    Args:
      adapters: the tree of {"a", "b"} that learns.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: scale * leaf if path[-1].key == "b" else leaf, adapters
    )


def adapter_boxes(box: Named, rank: int) -> dict[str, Named]:
    """Returns the shapes of A and B in their boxes.

    Each lies on a mesh as the matrix does: A along the inputs, B along the outputs. The rank is
    whole everywhere.
    """
    inputs, outputs = box.matrix_axes
    stacked = sum(name in STACKING_AXES for name in box.names)

    def of(axes: tuple[int | None, ...], input_axes: int) -> Named:
        shape = tuple(rank if axis is None else box.value.shape[axis] for axis in axes)
        names = tuple("lora_rank" if axis is None else box.names[axis] for axis in axes)
        leaf: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        return Named(leaf, names, use=ParameterUse(input_axes=input_axes))

    first = tuple(range(stacked))
    return {"a": of((*first, *inputs, None), len(inputs)), "b": of((*first, None, *outputs), 1)}
