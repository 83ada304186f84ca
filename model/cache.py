"""What decoding remembers: the latents and the indexer's keys of the tokens read so far, the last few hidden states, and nothing else."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig


@flax.struct.dataclass
class LayerCache:
    """One layer: latent_BSR holds the normalised key-value latent and after it the rotated shared key; index_key_BSC the indexer's keys (C = 0: none);
    recent_BKD what the convolution before attention has yet to reach back to (K = 0: none)."""

    latent_BSR: Array
    index_key_BSC: Array
    recent_BKD: Array

    def write(self, entries: "LayerCache", at: Array) -> "LayerCache":
        """These entries of T tokens at slots at .. at + T - 1, the same slots in every row; of what is recent they have the newer."""

        def put(old_BSX: Array, new_BTX: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old_BSX, new_BTX.astype(old_BSX.dtype), at, axis=1)

        recent_BKD = entries.recent_BKD.astype(self.recent_BKD.dtype)
        return LayerCache(put(self.latent_BSR, entries.latent_BSR), put(self.index_key_BSC, entries.index_key_BSC), recent_BKD)


@flax.struct.dataclass
class Cache:
    """All layers, the segment of each slot (0: nothing there, or padding), the next position of each row, and the number of slots filled."""

    layers: tuple[LayerCache, ...]
    segments_BS: Array
    next_position_B: Array
    length: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "Cache":
        dtype = jnp.dtype(config.dtype)
        width = config.indexer.width if config.indexer.heads else 0
        latent = config.attention.latent_rank + config.attention.rope_width
        recent = jnp.zeros((batch, max(config.canon - 1, 0), config.width), dtype)
        layer = LayerCache(jnp.zeros((batch, slots, latent), dtype), jnp.zeros((batch, slots, width), dtype), recent)
        return cls((layer,) * config.layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32))
