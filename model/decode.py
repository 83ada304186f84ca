"""Reading and writing token by token: `prefill` fills a cache, `read` extends it.

Attention over cached latents is absorbed (model/attention/decode.py).
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.cache import Cache
from model.config import ModelConfig
from model.experts import table
from model.heads import embed
from model.layers.norm import RMSNorm
from model.record import Choices, choices_of
from model.sharding import is_named
from model.transformer import Block, Output, Transformer, boxed_shapes, layer_paths


@flax.struct.dataclass
class DecodeWeights:
    """A model's variables with the stacked layers taken apart.

    It is made once, so that a step does not copy a layer's weights out of the stack.

    params: the parameters outside the layers.
    layers: per layer {"params": ..., "router": ...}.
    side_by_side: whether the routed experts' gate and up are [D, E * F] each, see `expert_columns`,
      and not [E, D, F].
    """

    params: dict
    layers: tuple[dict, ...]
    side_by_side: bool = flax.struct.field(pytree_node=False)


def decode_weights(config: ModelConfig, variables: dict, rows: int) -> DecodeWeights:
    """Prepares the weights that `read` takes.

    They are cast to the compute type, except those declared with `keep_float32`: a step then reads
    half the bytes in bfloat16. With few rows every expert sees every token, in one matmul over all
    experts (model/experts/table.py). On one CPU their weights are laid out for that matmul here,
    once; XLA would do it anew in every step.

    Args:
      config: the model.
      variables: {"params", "router"}.
      rows: how many rows a step decodes.
    """
    variables = jax.tree.map(
        lambda box, leaf: leaf if box.use.keep_float32 else leaf.astype(config.dtype),
        boxed_shapes(config),
        variables,
        is_leaf=is_named,
    )
    # Side by side, experts cannot be divided over devices.
    one_cpu = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    side_by_side = (
        one_cpu
        and table.few_choices(rows * config.moe.num_experts_per_tok, config.moe.num_experts)
        and config.expert_matmul in ("auto", "reference")
    )
    layers = []
    for stack, block, index in layer_paths(config):
        own = {kind: variables[kind].get(stack, {}).get(block, {}) for kind in ("params", "router")}
        own = jax.tree.map(lambda leaf, i=index: leaf[i], own)
        layers.append(map_gate_and_up(expert_columns, own) if side_by_side else own)
    params = {
        name: leaf for name, leaf in variables["params"].items() if not name.startswith("layers_")
    }
    return DecodeWeights(params, tuple(layers), side_by_side)


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


def prefill(
    config: ModelConfig,
    variables: dict,
    tokens_BT: Array,
    count_B: Array,
    capacity: int,
    stage: str,
    attention_top_p: float = 1.0,
    record: Collection[str] = (),
) -> tuple[Cache, Array, Choices | None]:
    """Reads the beginnings of sequences into a new cache, as the trainer's forward pass does.

    Args:
      variables: {"params", "router"}.
      tokens_BT: one sequence a row, padded on the right.
      count_B: how many tokens each row has, from 0 to T.
      capacity: for how many tokens a row has room, at least T.
      stage: "dense" | "sparse"; what is decoded from the cache shall have the same.
      attention_top_p: decoding reads the fewest keys that by estimate have this share of attention
        (Twilight, arXiv 2502.02770).
      record: which of `model.record.CHOICES` to return.

    Returns: the cache; the hidden states [B, D] of each row's last token, for the output head; and
    the choices, None where none are recorded.
    """
    B, T = tokens_BT.shape
    cache = Cache.empty(config, B, capacity, stage, attention_top_p)
    tokens = cache.tokens(count_B, T, stage)
    inputs, choices = (tokens_BT, tokens.positions_BT, tokens.segments_BT), None
    applied: Any = Transformer(config).apply(
        variables, *inputs, stage=stage, mtp=False, mutable=["record"] if record else False
    )
    output = cast(Output, applied[0] if record else applied)
    if record:
        of_layers = [
            jax.tree.map(lambda leaf, i=index: leaf[i], applied[1]["record"][stack][block])
            for stack, block, index in layer_paths(config)
        ]
        choices = choices_of(config, of_layers, tokens_BT, record, capacity)
    layers = tuple(
        layer.write(entries, cast(Array, tokens.index_BT))
        for layer, entries in zip(cache.layers, output.entries, strict=True)
    )
    return Cache(layers, count_B, capacity), last_of(output.hidden_BTD, count_B), choices


def last_of(hidden_BTD: Array, count_B: Array) -> Array:
    """Returns the hidden states [B, D] of each row's last token; of an empty row, any."""
    return jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]


def read(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens_BT: Array,
    count_B: Array,
    cache: Cache,
    stage: str,
    record: Collection[str] = (),
) -> tuple[Cache, Array, Choices | None]:
    """Reads a few more tokens of every row, each row as many as it has.

    Args:
      tokens_BT: the tokens, padded on the right.
      count_B: how many each row has, from 0, which leaves the row as it is, to T.
      cache: what the rows have read, with room for these tokens.
      stage: "dense" | "sparse".
      record: which of `model.record.CHOICES` to return.

    Returns: the longer cache; the hidden states [B, T, D] for the output head; and the choices,
    None where none are recorded.
    """
    tokens = cache.tokens(count_B, tokens_BT.shape[1], stage)
    x_BTD = embed(config, weights.params["embedding"], tokens_BT)
    layers, recorded = [], []
    for kind, layer, past in zip(config.kinds, weights.layers, cache.layers, strict=True):
        if weights.side_by_side:
            # Tied to the step: a compiler that may move this out of a loop over steps undoes
            # `expert_columns` with it.
            x_BTD, layer = jax.lax.optimization_barrier((x_BTD, layer))
            layer = map_gate_and_up(
                functools.partial(expert_matrices, count=config.moe.num_experts), layer
            )
        mutable = ["record"] if record else False
        applied: Any = Block(config, kind).apply(layer, x_BTD, tokens, past, mutable=mutable)
        x_BTD, (_, written) = applied[0] if record else applied
        layers.append(written)
        recorded.append(applied[1]["record"] if record else {})
    final_norm = RMSNorm(config.rms_norm_eps, config.norm)
    hidden_BTD = cast(Array, final_norm.apply({"params": weights.params["final_norm"]}, x_BTD))
    choices = None
    if record:
        choices = choices_of(config, recorded, tokens_BT, record, cache.capacity)
    return Cache(tuple(layers), cache.length_B + count_B, cache.capacity), hidden_BTD, choices
