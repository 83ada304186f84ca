"""The table of the types of attention that a layer may have (`model.layer_types`).

A new type is a row here, a module with its equation, a cache where it decodes, and its section in
model/layer_configs.py. Which function computes attention in a module is a table of its own,
model/attention/table.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from model.attention.caches import AttentionCache, DeltaCache, KeyValueCache, LatentCache
from model.attention.reference import IndexerStats
from model.layers.delta import GatedDeltaNet
from model.layers.gqa import GroupedAttention
from model.layers.mla import LatentAttention

# (hidden_BTD, TokenInfo, the layer's cache or None) -> its output [B, T, D], what its indexer did,
# and its cache entries of these tokens; with a cache, the whole cache with them.
Attention = Callable[..., tuple[Array, IndexerStats, Any]]


class AttentionType(NamedTuple):
    """A type of attention.

    module: Linen module, (config, name) -> `Attention`.
    cache: what it remembers.
    has_indexer: whether it selects keys with an indexer where `model.indexer.n_heads` is above 0.
    """

    module: Callable[..., Attention]
    cache: type[AttentionCache]
    has_indexer: bool


ATTENTION_TYPES = {
    "mla": AttentionType(LatentAttention, LatentCache, has_indexer=True),
    "gqa": AttentionType(GroupedAttention, KeyValueCache, has_indexer=False),
    "delta": AttentionType(GatedDeltaNet, DeltaCache, has_indexer=False),
}
