"""The cache of decoding: what each layer's attention needs of the tokens read so far.

The caches of the types of attention are in model/attention/caches.py.
"""

import flax.struct
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from model.attention.caches import AttentionCache
from model.config import ModelConfig
from model.layers.table import ATTENTION_TYPES


@flax.struct.dataclass
class LayerCache:
    """The cache of one layer, or the entries of some tokens on their way to it.

    attention: what its attention remembers.
    recent_BPD: the last P inputs of the convolution before attention, see
      `model.layers.convolution`; P is 0 without one.
    """

    attention: AttentionCache
    recent_BPD: Array

    def write(self, entries: "LayerCache", slot: ArrayLike) -> "LayerCache":
        """Returns the cache with the entries of T tokens at slots `slot` .. `slot` + T - 1.

        The entries already have the newer of the recent inputs.
        """
        return LayerCache(
            self.attention.write(entries.attention, slot),
            entries.recent_BPD.astype(self.recent_BPD.dtype),
        )


@flax.struct.dataclass
class Cache:
    """The cache of a model.

    layers: a cache for each layer of the trunk.
    segments_BS: the segment of each slot; 0: nothing is there, or padding.
    next_position_B: the position of each row's next token.
    length: the number of slots filled, the same in every row.
    """

    layers: tuple[LayerCache, ...]
    segments_BS: Array
    next_position_B: Array
    length: Array

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, stage: str, attention_top_p: float = 1.0
    ) -> "Cache":
        """Returns a cache of `batch` rows with room for `slots` tokens.

        Args:
          stage: the stage that it is read in, "dense" or "sparse".
          attention_top_p: the share of attention's probability that decoding reads.
        """
        P = max(config.canon_kernel_size - 1, 0)
        recent_BPD = jnp.zeros((batch, P, config.hidden_size), config.dtype)
        caches = (ATTENTION_TYPES[kind.attention].cache for kind in config.kinds)
        layers = tuple(
            LayerCache(cache.empty(config, batch, slots, stage, attention_top_p), recent_BPD)
            for cache in caches
        )
        segments_BS = jnp.zeros((batch, slots), jnp.int32)
        zeros_B = jnp.zeros((batch,), jnp.int32)
        return cls(layers, segments_BS, zeros_B, jnp.zeros((), jnp.int32))
