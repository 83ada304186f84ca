"""Reading and writing token by token: `prefill` fills a cache, `decode_step` extends it.

Attention over cached latents is absorbed (model/attention/decode.py).
"""

import functools
from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.cache import Cache
from model.config import ModelConfig
from model.experts import table
from model.heads import embed, logits_of
from model.layers.norm import RMSNorm
from model.segments import TokenInfo
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
    """Prepares the weights that `decode_step` reads.

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
    segments_BT: Array,
    slots: int,
    stage: str,
    attention_top_p: float = 1.0,
) -> tuple[Cache, Array]:
    """Reads prompts, in full, into a new cache.

    Args:
      variables: {"params", "router"}.
      tokens_BT, segments_BT: prompts, padded on the left (segment 0) so that each ends in the last
        column.
      slots: for how many tokens a row has room, the prompt included.
      stage: "dense" | "sparse"; what is decoded from the cache shall have the same.
      attention_top_p: decoding reads the fewest keys that by estimate have this share of attention
        (Twilight, arXiv 2502.02770).

    Returns: the cache with T slots filled, and the logits [B, V] after the last token.
    """
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT > 0, axis=-1) - 1, 0)
    output = cast(
        Output,
        Transformer(config).apply(
            variables, tokens_BT, positions_BT, segments_BT, stage=stage, mtp=False
        ),
    )
    B, T = tokens_BT.shape
    cache = Cache.empty(config, B, slots, stage, attention_top_p)
    cache = Cache(
        layers=tuple(
            layer.write(entries, 0)
            for layer, entries in zip(cache.layers, output.entries, strict=True)
        ),
        segments_BS=cache.segments_BS.at[:, :T].set(segments_BT),
        next_position_B=positions_BT[:, -1] + 1,
        length=jnp.asarray(T, jnp.int32),
    )
    return cache, logits_of(config, variables["params"], output.hidden_BTD[:, -1])


def decode_step(
    config: ModelConfig, weights: DecodeWeights, tokens_B: Array, cache: Cache, stage: str
) -> tuple[Cache, Array]:
    """Reads one token a row. Returns the longer cache and the logits [B, V] for the next.

    `stage` is "dense" or "sparse".
    """
    segments_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.segments_BS, jnp.ones_like(tokens_B)[:, None], cache.length, axis=1
    )
    positions_B1 = cache.next_position_B[:, None]
    tokens = TokenInfo(
        positions_B1,
        jnp.ones_like(positions_B1),
        stage,
        allowed_BTS=(segments_BS > 0)[:, None],
        slot=cache.length,
    )
    x_B1D = embed(config, weights.params["embedding"], tokens_B[:, None])
    layers = []
    for kind, layer, past in zip(config.kinds, weights.layers, cache.layers, strict=True):
        if weights.side_by_side:
            # Tied to the step: a compiler that may move this out of a loop over steps undoes
            # `expert_columns` with it.
            x_B1D, layer = jax.lax.optimization_barrier((x_B1D, layer))
            layer = map_gate_and_up(
                functools.partial(expert_matrices, count=config.moe.num_experts), layer
            )
        x_B1D, (_, written) = Block(config, kind).apply(layer, x_B1D, tokens, past)
        layers.append(written)
    final_norm = RMSNorm(config.rms_norm_eps, config.norm)
    hidden_BD = cast(Array, final_norm.apply({"params": weights.params["final_norm"]}, x_B1D[:, 0]))
    longer = Cache(tuple(layers), segments_BS, cache.next_position_B + 1, cache.length + 1)
    return longer, logits_of(config, weights.params, hidden_BD)
