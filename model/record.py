"""Forward passes that record what the layers did, or do again what was recorded.

A record has hidden states, expert choices and selected keys. In a replay tokens go to the recorded
experts, with gates of the scores they have now, and attend to the recorded keys: the rest of the
pass is as ever, and differentiable.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.config import ModelConfig
from model.layers.table import ATTENTION_TYPES
from model.transformer import Output, Transformer, layer_paths

CHOICES = ("routes", "selected")
"""What layers choose, by the names that a record of it has: experts, and keys to attend to."""


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


@flax.struct.dataclass
class Choices:
    """What layers chose for the tokens [B, T] that they read, in the smallest types that hold it.

    routes_BTLK: the experts in the layers of `routing_layers`, of `expert_type`; L is 0 in a model
      without any, and where they are not recorded.
    selected_BTLk: the keys attended to in the layers of `selecting_layers`: positions in order,
      then -1, int16 or int32; L is 0 where nothing selects, and where they are not recorded.
    """

    routes_BTLK: Array
    selected_BTLk: Array

    def at(self, index: Any) -> "Choices":
        """Returns those of some tokens, indexed as numpy does."""
        return Choices(self.routes_BTLK[index], self.selected_BTLk[index])


def choices_of(
    config: ModelConfig,
    layers: Sequence[Mapping],
    tokens_BT: Array,
    record: Collection[str],
    capacity: int,
) -> Choices:
    """Returns what was recorded by each layer, of which one has a collection "record".

    Args:
      record: which of `CHOICES` are wanted.
      capacity: what all positions are below.
    """
    found = []
    for numbers, kind, name, smallest in (
        (routing_layers(config), "moe", "routes", expert_type(config)),
        (selecting_layers(config), "attention", "selected", position_type(capacity)),
    ):
        recorded = [layers[n][kind][name][0] for n in numbers if name in layers[n].get(kind, {})]
        if recorded and name in record:
            found.append(jnp.stack(recorded, axis=2).astype(smallest))
        else:
            found.append(jnp.zeros((*tokens_BT.shape, 0, 0), smallest))
    return Choices(*found)


def expert_type(config: ModelConfig) -> np.dtype:
    """Returns the smallest unsigned type of an expert's number; its largest stands for none."""
    return np.min_scalar_type(config.moe.num_experts)


def position_type(capacity: int) -> np.dtype:
    """Returns the type of a position below the capacity, or -1: int16 or int32."""
    return np.dtype(np.int16 if capacity <= 2**15 else np.int32)


def selecting_layers(config: ModelConfig) -> list[int]:
    """Returns the numbers of the layers whose attention selects keys by an indexer of its own."""
    if not config.indexer.n_heads:
        return []
    kinds = enumerate(config.kinds)
    return [number for number, kind in kinds if ATTENTION_TYPES[kind.attention].has_indexer]


def routing_layers(config: ModelConfig) -> list[int]:
    """Returns the numbers of the layers with experts."""
    return [number for number, kind in enumerate(config.kinds) if kind.moe]


def replay(
    config: ModelConfig, routes_BLTK: Array | None = None, selected_BLTk: Array | None = None
) -> dict:
    """Returns the collection {"replay": ...} that `Transformer.apply` reads beside variables.

    Args:
      routes_BLTK: each token's experts in the layers of `routing_layers`; -1 where it chooses anew.
      selected_BLTk: the keys that each query attends to in stage "sparse", in the layers of
        `selecting_layers`: where they stand in the row, in order, then -1. A query of which none
        is recorded attends to the k latest.
    """
    collected: dict = {}

    def add(layers: list[int], kind: str, name: str, recorded_BLT: Array) -> None:
        for place, number in enumerate(layers):
            stack, block, _ = layer_paths(config)[number]
            module = collected.setdefault(stack, {}).setdefault(block, {}).setdefault(kind, {})
            module.setdefault(name, []).append(recorded_BLT[:, place])

    if routes_BLTK is not None:
        add(routing_layers(config), "moe", "routes", routes_BLTK)
    if selected_BLTk is not None:
        add(selecting_layers(config), "attention", "selected", selected_BLTk)
    stacked = jax.tree.map(jnp.stack, collected, is_leaf=lambda leaf: isinstance(leaf, list))
    return {"replay": stacked} if stacked else {}
