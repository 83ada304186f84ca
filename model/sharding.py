"""Sharding is one table: logical axis names on the left, mesh axes on the right.

Parameters carry logical names from where they are made (`model/layers/parameter.py`); activations
get theirs by `constrain`; code that runs per device asks the table by `spec` and `mesh_axis`. The
same table serves one CPU, eight pretended devices and a pod.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from errors import UserError
from model.mesh import MESH_AXES, MeshConfig

RULES: dict[str, tuple[str, ...] | str | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",  # hidden_size
    "heads": "tensor",
    "head_dim": None,
    "query_rank": None,
    "latent_rank": None,
    "lora_rank": None,
    "ffn": "tensor",
    "experts": "expert",
    "stacked": None,  # separate matrices in one parameter
    "replicated": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    "time": None,
    "hidden": None,
    "query_blocks": "tensor",  # blocks of queries in attention by tiles (model/attention/tiled.py)
}
# Axes along which a parameter has separate matrices.
STACKING_AXES = ("layers", "experts", "stacked")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Makes the mesh over all devices, or over those given.

    Raises UserError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    wanted = math.prod(sizes) if -1 not in sizes else fixed
    if wanted != len(devices):
        axes = ",".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        kind = devices[0].platform.upper()
        multiple = "a multiple of " if -1 in sizes else ""
        seen = f"this run sees {len(devices)} {kind} device(s)"
        raise UserError(
            f"mesh {axes} needs {multiple}{wanted} devices; {seen} "
            f"(for a dry run: --pretend_devices={wanted})"
        )
    return Mesh(
        np.asarray(devices).reshape(sizes),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    )


@dataclasses.dataclass(frozen=True)
class ParameterUse:
    """Tells the optimizer and decoding what they must know about a parameter, beside its axes.

    per_channel: no matrix product takes it (scales, biases, convolution kernels, rates of decay):
      it has no weight decay, and Muon leaves it to AdamW.
    keep_float32: decoding reads it in float32, as training does, whatever `model.dtype` is.
    input_axes: how many axes the matrix product sums over, the first ones after those along which
      separate matrices are stacked.
    """

    per_channel: bool = False
    keep_float32: bool = False
    input_axes: int = 1


class Named(nn.Partitioned):
    """A parameter in a box with the logical names of its axes and its use.

    Flax's own box would read the names as mesh axes when it is opened under a mesh.
    """

    use: ParameterUse = flax.struct.field(pytree_node=False, default=ParameterUse())

    def unbox(self, apply_constraint: bool = True) -> Any:
        """Returns the parameter without its box."""
        return self.value

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of the axes that its matrix product sums over, and of those it writes to."""
        first = sum(name in STACKING_AXES for name in self.names)
        split = first + self.use.input_axes
        return tuple(range(first, split)), tuple(range(split, len(self.names)))


def named(
    init: Callable[..., Array], names: tuple[str | None, ...], use: ParameterUse | None = None
) -> Callable[..., Named]:
    """Returns an initialiser whose result carries the names of its axes, and its use."""
    use = use or ParameterUse()
    return lambda *args, **kwargs: Named(init(*args, **kwargs), names, use=use)


def is_named(leaf: Any) -> bool:
    """Tells whether a leaf is a parameter in its box, for `jax.tree.map(..., is_leaf=is_named)`."""
    return isinstance(leaf, Named)


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """Returns the mesh axes over which an axis of this logical name is divided, maybe none."""
    axes = None if name is None else RULES[name]
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def mesh_axis(name: str) -> str:
    """Returns the one mesh axis of a logical name, for a collective over it."""
    (axis,) = mesh_axes(name)
    return axis


def ambient_shards(name: str) -> int:
    """Counts the devices of the ambient mesh that divide an axis of this name; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def on_one_device() -> bool:
    """Tells whether there is no ambient mesh (`jax.set_mesh`), or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def map_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns the function by `jax.shard_map` over the ambient mesh; itself on one device."""
    if on_one_device():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def spec(*names: str | None) -> P:
    """Returns the PartitionSpec of an array whose axes have these logical names."""
    return P(*(None if name is None else RULES[name] for name in names))


def constrain(x: Array, *names: str | None) -> Array:
    """Asks for an activation's sharding by the logical names of its axes.

    Without an ambient mesh (`jax.set_mesh`) it is the identity.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of each abstract parameter, by the names in its box.

    Raises UserError when an axis does not divide over the mesh, naming the parameter.
    """

    def sharding(path, leaf) -> NamedSharding:
        """Returns the sharding of one parameter, or raises UserError."""
        names = leaf.names if is_named(leaf) else (None,) * leaf.ndim
        shape = leaf.value.shape if is_named(leaf) else leaf.shape
        for size, name in zip(shape, names, strict=True):
            devices = math.prod(mesh.shape[axis] for axis in mesh_axes(name))
            if size % devices:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"parameter {where}: its {name} axis of {size} does not divide over the "
                    f"{devices} devices of mesh axis {RULES[name]}; change either"
                )
        return NamedSharding(mesh, spec(*names))

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_named)


def batch_shards(mesh: Mesh) -> int:
    """Counts the devices over which the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes("batch"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of rows over all data-like axes; the other axes stay whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device has whole."""
    return NamedSharding(mesh, P())
