"""A forward pass that records what the layers did: hidden states, expert choices, selected keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.transformer import Output, Transformer, layer_paths


class Record(NamedTuple):
    """Records what the layers of the trunk compute and choose, in order; -1 stands for nothing.

    hidden_BLTD: each layer's output; the last one's before the final norm.
    routes_BLTK: the experts of each token, best first; -1 in layers without experts. K is 0 in a
      model without any.
    selected_BLTk: the keys each query attended to, in order, -1 where they are fewer than topk; -1
      in layers without an indexer. k is 0 where nothing selects.
    """

    hidden_BLTD: Array
    routes_BLTK: Array
    selected_BLTk: Array


def recorded_forward(
    config: ModelConfig,
    variables: dict,
    tokens_BT: Array,
    positions_BT: Array,
    segments_BT: Array,
    stage: str,
) -> tuple[Output, Record]:
    """Returns the output of the forward pass and what its layers did.

    Args:
      variables: {"params", "router"}.
      tokens_BT, positions_BT, segments_BT, stage: see `Transformer.__call__`.
    """
    output, recorded = Transformer(config).apply(
        variables, tokens_BT, positions_BT, segments_BT, stage=stage, mutable=["record"]
    )
    hidden, routes, selected = [], [], []
    for stack, block, index in layer_paths(config):
        layer = recorded["record"][stack][block]
        hidden.append(layer["hidden"][0][index])
        routes.append(layer["moe"]["routes"][0][index] if "moe" in layer else None)
        selected.append(layer["attention"]["selected"][0][index] if "attention" in layer else None)
    return output, Record(
        jnp.stack(hidden, axis=1), _stacked(routes, tokens_BT), _stacked(selected, tokens_BT)
    )


def _stacked(layers: list[Array | None], tokens_BT: Array) -> Array:
    """Stacks what layers recorded to [B, L, T, k] int32, -1 for a layer that has none."""
    found = next(
        (layer for layer in layers if layer is not None),
        jnp.zeros((*tokens_BT.shape, 0), jnp.int32),
    )
    return jnp.stack(
        [jnp.full_like(found, -1) if layer is None else layer for layer in layers], axis=1
    )
