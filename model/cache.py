"""The cache of decoding: what each layer's attention needs of the tokens read so far.

The caches of the types of attention are in model/attention/caches.py.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.caches import AttentionCache
from model.config import ModelConfig
from model.layers.table import ATTENTION_TYPES
from model.segments import TokenInfo


@flax.struct.dataclass
class LayerCache:
    """The cache of one layer, or the entries of some tokens on their way to it.

    attention: what its attention remembers.
    recent_BPD: the last P inputs of the convolution before attention, see
      `model.layers.convolution`; P is 0 without one.
    """

    attention: AttentionCache
    recent_BPD: Array

    def write(self, entries: "LayerCache", index_BT: Array) -> "LayerCache":
        """Returns the cache with the entry of each token at its index; past the end it writes none.

        The entries already have the newer of the recent inputs.
        """
        return LayerCache(
            self.attention.write(entries.attention, index_BT),
            entries.recent_BPD.astype(self.recent_BPD.dtype),
        )


@flax.struct.dataclass
class Cache:
    """The cache of a model: B rows of as many tokens as each has read, no two rows alike.

    layers: a cache for each layer of the trunk.
    length_B: the tokens that each row has read. The token at position p of a row is at index p;
      what stands behind the last means nothing.
    capacity: for how many tokens a row has room.
    """

    layers: tuple[LayerCache, ...]
    length_B: Array
    capacity: int = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        stage: str,
        attention_top_p: float = 1.0,
    ) -> "Cache":
        """Returns a cache of `batch` rows with room for `capacity` tokens.

        Args:
          stage: the stage that it is read in, "dense" or "sparse".
          attention_top_p: the share of attention's probability that decoding reads.
        """
        P = max(config.canon_kernel_size - 1, 0)
        recent_BPD = jnp.zeros((batch, P, config.hidden_size), config.dtype)
        caches = (ATTENTION_TYPES[kind.attention].cache for kind in config.kinds)
        layers = tuple(
            LayerCache(cache.empty(config, batch, capacity, stage, attention_top_p), recent_BPD)
            for cache in caches
        )
        return cls(layers, jnp.zeros((batch,), jnp.int32), capacity)

    def tokens(self, count_B: Array, width: int, stage: str) -> TokenInfo:
        """Describes the next tokens [B, width] of every row, of which the first `count_B` are real.

        A token attends to those of its row up to itself.
        """
        offset_T = jnp.arange(width)
        positions_BT = self.length_B[:, None] + offset_T
        real_BT = offset_T < count_B[:, None]
        return TokenInfo(
            positions_BT,
            real_BT.astype(jnp.int32),
            stage,
            allowed_BTS=jnp.arange(self.capacity) <= positions_BT[..., None],
            index_BT=jnp.where(real_BT, positions_BT, self.capacity),
        )

    def take(self, row_R: Array) -> "Cache":
        """Returns the cache of some rows; of a number past the last row, any of them."""
        layers, length_R = jax.tree.map(
            lambda leaf: jnp.take(leaf, row_R, axis=0, mode="clip"), (self.layers, self.length_B)
        )
        return Cache(layers, length_R, self.capacity)

    def put(self, row_R: Array, rows: "Cache") -> "Cache":
        """Returns the cache with other rows at these numbers; past the last row none is written."""
        layers, length_B = jax.tree.map(
            lambda leaf, new: leaf.at[row_R].set(new, mode="drop"),
            (self.layers, self.length_B),
            (rows.layers, rows.length_B),
        )
        return Cache(layers, length_B, self.capacity)
