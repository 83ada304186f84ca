"""Sharding is one table: logical axis names on the left, mesh axes on the right.

Parameters carry logical names from where they are made (`named`); activations get theirs by
`constrain`. The same table serves one CPU, eight pretended devices and a pod.
"""

import math
from collections.abc import Callable

import flax.linen as nn
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
    "width": "fsdp",
    "heads": "tensor",
    "head_width": None,
    "query_rank": None,
    "latent_rank": None,
    "ffn": "tensor",
    "experts": "expert",
    "replicated": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    "time": None,
    "hidden": None,
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices (or those given). Raises UserError when the axes do not multiply to
    their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    wanted = math.prod(sizes) if -1 not in sizes else fixed
    if wanted != len(devices):
        named = ",".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        kind = devices[0].platform.upper()
        multiple = "a multiple of " if -1 in sizes else ""
        seen = f"this run sees {len(devices)} {kind} device(s)"
        raise UserError(
            f"mesh {named} needs {multiple}{wanted} devices; {seen} (for a dry run: --pretend_devices={wanted})"
        )
    return Mesh(
        np.asarray(devices).reshape(sizes),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    )


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


class Named(nn.Partitioned):
    """A parameter with the logical names of its axes. Flax's own box would read the names as mesh
    axes when it is opened under a mesh.
    """

    def unbox(self, apply_constraint: bool = True):
        return self.value


def named(init: Callable[..., Array], names: tuple[str | None, ...]) -> Callable[..., Named]:
    """An initialiser whose result carries the names of its axes."""
    return lambda *args, **kwargs: Named(init(*args, **kwargs), names)


def spec(*names: str | None) -> P:
    """The PartitionSpec of an array whose axes have these logical names."""
    return P(*(None if name is None else RULES[name] for name in names))


def constrain(x: Array, *names: str | None) -> Array:
    """Asks for an activation's sharding by the logical names of its axes. Without an ambient mesh
    (`jax.set_mesh`) it is the identity.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def shardings(boxed, mesh: Mesh):
    """NamedShardings for a tree of abstract parameters as `jax.eval_shape(model.init, ...)` gives
    it, names still attached.

    Raises UserError when an axis does not divide over the mesh, naming the parameter.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, Named) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, Named) else leaf.shape
        partition = spec(*names)
        for size, name, axes in zip(shape, names, partition, strict=True):
            parts = math.prod(
                mesh.shape[axis]
                for axis in (axes if isinstance(axes, tuple) else (axes,) if axes else ())
            )
            if size % parts:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"parameter {where}: its {name} axis of {size} does not divide over the {parts} devices of mesh axis {axes}; change either"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda leaf: isinstance(leaf, Named)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-like axes; the other axes of the array whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
