"""How the policy reaches a sampler that has devices of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from errors import UserError
from model.adapters import COLLECTION
from model.config import ModelConfig
from train.base import abstract_learnt
from train.lora import Lora
from train.state import abstract_state, state_shardings


class Weights:
    """Copies variables to another mesh, while both meshes compute.

    Args:
      mesh: of the sampler.
      checked: whether what arrives is compared with what was sent, to the bit.
      lora: the adapters that learn, whose base is copied once; None where there are none.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, *, checked: bool, lora: Lora | None = None):
        self._mesh, self._checked, self._lora = mesh, checked, lora
        self._base: tuple[dict, dict] | None = None  # there and here
        abstract = abstract_state(model, optax.identity(), mesh)
        self._shardings = state_shardings(abstract.variables)
        if lora is not None:
            adapters = abstract_learnt(model, lora, optax.identity(), mesh).params
            self._shardings |= {COLLECTION: state_shardings(adapters)}
        self._fingerprint = jax.jit(fingerprint)

    @property
    def device(self) -> Any:
        """The device where the sampler's thread computes what is on no mesh."""
        return self._mesh.local_devices[0]

    def sent(self, variables: dict, step: int) -> Callable[[], dict]:
        """Begins to copy variables, which may be donated afterwards.

        Args:
          step: named where they do not arrive.

        Returns:
          A function that returns them when they are there, on the mesh of the sampler. It raises
          UserError where they are not what was sent.
        """
        moving, base = dict(variables), self._base
        if base is not None and base[0] is variables["params"]:
            del moving["params"]
        sent = self._fingerprint(moving) if self._checked else None
        where = {name: self._shardings[name] for name in moving}
        copies = jax.device_put(moving, where, may_alias=False)
        if self._lora is not None and "params" in moving:
            base = self._base = variables["params"], copies["params"]
        frozen = {} if base is None else {"params": base[1]}

        def arrived() -> dict:
            if sent is not None:
                with jax.set_mesh(self._mesh):
                    here = np.asarray(self._fingerprint(copies))
                if not np.array_equal(here, np.asarray(sent)):
                    raise UserError(
                        f"step {step}: the weights that reached the sampler are not those of the "
                        "trainer; go on from the last checkpoint, and report the devices' driver "
                        "if it happens again"
                    )
            return copies | frozen

        return arrived


def fingerprint(variables: dict) -> Array:
    """Returns a number for each array, uint32 [arrays]: a sum of its words, modulo 2^32.

    Each has an odd factor that depends on its place: one word that changes always shows, and
    several hardly ever cancel. As no float is added, it is the same however the arrays are sharded.
    """

    def of(x: Array) -> Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
            stride *= x.shape[axis]
        factors = (place * np.uint32(2_654_435_761)) | np.uint32(1)
        return jnp.sum(words * factors, dtype=jnp.uint32)

    return jnp.stack([of(x) for x in jax.tree.leaves(variables)])
