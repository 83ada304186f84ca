"""Reading and writing token by token: prefill fills a cache, decode_step extends it. Absorbed
attention over latents (model/attention/reference.py).
"""

import functools
from collections.abc import Callable

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
from model.transformer import Block, Transformer, layer_paths


@flax.struct.dataclass
class DecodeWeights:
    """A model's variables with the stacked layers taken apart, once, so that a step does not copy a
    layer's weights out of the stack.
    """

    params: dict
    layers: tuple[dict, ...]  # per layer {"params": ..., "router": ...}
    side_by_side: bool = flax.struct.field(
        pytree_node=False
    )  # the routed experts' gate and up are [D, E * F] each, and not [E, D, F]


def decode_weights(config: ModelConfig, variables: dict, rows: int) -> DecodeWeights:
    """What `decode_step` reads for so many rows. Cast to the compute type: a step then reads half
    the bytes in bfloat16. What training keeps in float32 stays so. With few rows every expert sees
    every token (kernels/table.py), in one matmul over all of them: on one CPU its weights are laid
    out for it here, as XLA does it in every step otherwise.
    """

    kept = ("scale", "bias", "router", "decay_rate", "decay_bias")

    def cast(path, leaf):
        return leaf if path[-1].key in kept else leaf.astype(config.dtype)

    variables = jax.tree_util.tree_map_with_path(cast, variables)
    one_cpu = (
        platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    )  # side by side, experts cannot be cut over devices
    side_by_side = (
        one_cpu
        and table.few(rows * config.moe.num_experts_per_tok, config.moe.num_experts)
        and config.expert_matmul in ("auto", "reference")
    )
    layers = []
    for run, block, index in layer_paths(config):
        own = {kind: variables[kind].get(run, {}).get(block, {}) for kind in ("params", "router")}
        own = jax.tree.map(lambda leaf, i=index: leaf[i], own)
        layers.append(with_experts(own, expert_columns) if side_by_side else own)
    params = {
        name: leaf for name, leaf in variables["params"].items() if not name.startswith("layers_")
    }
    return DecodeWeights(params, tuple(layers), side_by_side)


def expert_columns(w_EDF: Array) -> Array:
    """The experts' matrices side by side as one, [D, E * F]."""
    return jnp.swapaxes(w_EDF, 0, 1).reshape(w_EDF.shape[1], -1)


def expert_matrices(w_DX: Array, count: int) -> Array:
    """Those of `expert_columns` apart again, [E, D, F]."""
    return jnp.swapaxes(w_DX.reshape(w_DX.shape[0], count, -1), 0, 1)


def with_experts(layer: dict, change: Callable[[Array], Array]) -> dict:
    """A layer's variables with the routed experts' gate and up changed."""
    if "moe" not in layer["params"]:
        return layer
    moe = layer["params"]["moe"]
    return layer | {
        "params": layer["params"]
        | {"moe": moe | {name: change(moe[name]) for name in ("gate", "up")}}
    }


def prefill(
    config: ModelConfig,
    variables: dict,
    tokens_BT: Array,
    segments_BT: Array,
    slots: int,
    stage: str,
    attention_top_p: float = 1.0,
) -> tuple[Cache, Array]:
    """Reads prompts, padded on the left (segment 0) so that each ends in the last column. What is
    decoded from the cache shall have the same stage, and of attention's keys it reads the fewest
    that by estimate hold `attention_mass` of it (Twilight, arXiv 2502.02770); prompts are read in
    full.

    Returns the cache with `slots` slots (T of them filled) and the logits [B, V] after the last
    token.
    """
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT > 0, axis=-1) - 1, 0)
    output = Transformer(config).apply(
        variables, tokens_BT, positions_BT, segments_BT, stage=stage, mtp=False
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
    """Reads one token a row; returns the longer cache and the logits [B, V] for the next. `stage`
    is "dense" or "sparse".
    """
    at = cache.length
    segments_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.segments_BS, jnp.ones_like(tokens_B)[:, None], at, axis=1
    )
    positions_B1 = cache.next_position_B[:, None]
    x_B1D = embed(config, weights.params["embedding"], tokens_B[:, None])
    layers = []
    for kind, layer, past in zip(config.kinds, weights.layers, cache.layers, strict=True):
        block = Block(config, kind)
        if weights.side_by_side:
            # Tied to the step: a compiler that may move this out of a loop over steps undoes
            # `expert_columns` with it.
            x_B1D, layer = jax.lax.optimization_barrier((x_B1D, layer))
            layer = with_experts(
                layer, functools.partial(expert_matrices, count=config.moe.num_experts)
            )
        x_B1D, (_, _, written) = block.apply(
            layer,
            x_B1D,
            positions_B1,
            jnp.ones_like(positions_B1),
            stage,
            past,
            (segments_BS > 0)[:, None],
            at,
        )
        layers.append(written)
    hidden_BD = RMSNorm(config.rms_norm_eps, config.norm).apply(
        {"params": weights.params["final_norm"]}, x_B1D[:, 0]
    )
    return Cache(tuple(layers), segments_BS, cache.next_position_B + 1, at + 1), logits_of(
        config, weights.params, hidden_BD
    )


def jitted_step(
    config: ModelConfig, stage: str
) -> Callable[[DecodeWeights, Array, Cache], tuple[Cache, Array]]:
    """`decode_step`, compiled, of a cache that is given up for the longer one: the token is written
    into it, and nothing of it copied.
    """
    return jax.jit(functools.partial(decode_step, config, stage=stage), donate_argnums=2)
