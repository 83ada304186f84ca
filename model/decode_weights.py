"""A model's weights as decoding wants them: layer by layer, in the compute type."""

import functools
import re
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.adapters import merged
from model.config import ModelConfig
from model.experts import table
from model.sharding import is_named
from model.transformer import boxed_shapes, layer_paths


@flax.struct.dataclass
class DecodeWeights:
    """A model's variables with the stacked layers taken apart.

    It is made once, so that a step does not copy a layer's weights out of the stack.

    params: the parameters outside the layers and the MTP modules.
    layers: per layer {"params": ..., "router": ...}.
    mtp: the same for the MTP modules, of which as many are there as draft.
    side_by_side: whether the routed experts' gate and up are [D, E * F] each, see `expert_columns`,
      and not [E, D, F].
    """

    params: dict
    layers: tuple[dict, ...]
    mtp: tuple[dict, ...]
    side_by_side: bool = flax.struct.field(pytree_node=False)

    def layer(self, number: int, x_BTD: Array, experts: int) -> tuple[Array, dict]:
        """Returns a layer's variables as `Block` takes them, and what it is given to read."""
        return self._as_matrices(self.layers[number], x_BTD, experts)

    def module(self, number: int, x_BTD: Array, experts: int) -> tuple[Array, dict]:
        """Returns an MTP module's variables, and what it is given to read."""
        x_BTD, own = self._as_matrices(_block_of(self.mtp[number]), x_BTD, experts)
        return x_BTD, {kind: self.mtp[number][kind] | {"block": own[kind]} for kind in own}

    def _as_matrices(self, layer: dict, x_BTD: Array, experts: int) -> tuple[Array, dict]:
        if not self.side_by_side:
            return x_BTD, layer
        # Tied to the step: a compiler that may move this out of a loop over steps undoes
        # `expert_columns` with it.
        x_BTD, layer = jax.lax.optimization_barrier((x_BTD, layer))
        return x_BTD, map_gate_and_up(functools.partial(expert_matrices, count=experts), layer)


def decode_weights(
    config: ModelConfig, variables: dict, rows: int, drafts: int = 0
) -> DecodeWeights:
    """Prepares the weights that `read` takes.

    Adapters (model/adapters.py) are added to what they adapt. All is cast to the compute type but
    what is declared with `keep_float32`: a step then reads half the bytes in bfloat16. With few
    rows every expert sees every token, in one matmul over all experts (model/experts/table.py). On
    one CPU their weights are laid out for that matmul here, once; XLA would do it anew in every
    step.

    Args:
      config: the model.
      variables: {"params", "router"}, and adapters where there are any.
      rows: how many tokens a step reads, over all rows.
      drafts: how many of the MTP modules draft.
    """
    variables = jax.tree.map(
        lambda box, leaf: leaf if box.use.keep_float32 else leaf.astype(config.dtype),
        boxed_shapes(config),
        merged(variables),
        is_leaf=is_named,
    )
    # Side by side, experts cannot be divided over devices.
    one_cpu = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    side_by_side = (
        one_cpu
        and table.few_choices(rows * config.moe.num_experts_per_tok, config.moe.num_experts)
        and config.expert_matmul in ("auto", "reference")
    )

    def laid_out(layer: dict) -> dict:
        return map_gate_and_up(expert_columns, layer) if side_by_side else layer

    layers = []
    for stack, block, index in layer_paths(config):
        own = {kind: variables[kind].get(stack, {}).get(block, {}) for kind in ("params", "router")}
        layers.append(laid_out(jax.tree.map(lambda leaf, i=index: leaf[i], own)))
    modules = []
    for number in range(drafts):
        module = {kind: variables[kind].get(f"mtp_{number}", {}) for kind in ("params", "router")}
        own = laid_out(_block_of(module))
        modules.append({kind: module[kind] | {"block": own[kind]} for kind in own})
    elsewhere = re.compile(r"layers_|mtp_\d")
    params = {name: leaf for name, leaf in variables["params"].items() if not elsewhere.match(name)}
    return DecodeWeights(params, tuple(layers), tuple(modules), side_by_side)


def _block_of(module: dict) -> dict:
    return {kind: module[kind].get("block", {}) for kind in module}


def expert_columns(w_EDF: Array) -> Array:
    """Puts the experts' matrices side by side as one, [D, E * F]."""
    return jnp.swapaxes(w_EDF, 0, 1).reshape(w_EDF.shape[1], -1)


def expert_matrices(w_DX: Array, count: int) -> Array:
    """Takes the matrices of `expert_columns` apart again, [E, D, F]."""
    return jnp.swapaxes(w_DX.reshape(w_DX.shape[0], count, -1), 0, 1)


def map_gate_and_up(function: Callable[[Array], Array], layer: dict) -> dict:
    """Returns a layer's variables with a function applied to the routed experts' gate and up."""
    if "moe" not in layer["params"]:
        return layer
    moe = layer["params"]["moe"]
    mapped = moe | {name: function(moe[name]) for name in ("gate", "up")}
    return layer | {"params": layer["params"] | {"moe": mapped}}
