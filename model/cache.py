"""What decoding remembers of the tokens read so far: per layer what its attention needs, the last few hidden states for the convolution, and nothing else.

| attention | remembers | grows |
|---|---|---|
| mla | the normalised key-value latent, and the indexer's keys | with every token |
| gqa | keys and values of the few key-value heads | with every token |
| delta | a matrix a head, and the last few inputs of its convolutions | not at all |
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig


def put(old_BSX: Array, new_BTX: Array, at: Array) -> Array:
    """New entries at slots at .. at + T - 1, the same slots in every row."""
    return jax.lax.dynamic_update_slice_in_dim(old_BSX, new_BTX.astype(old_BSX.dtype), at, axis=1)


@flax.struct.dataclass
class LatentCache:
    """latent_BSR holds the normalised key-value latent and after it the rotated shared key; index_key_BSC the indexer's keys (C = 0: none)."""

    latent_BSR: Array
    index_key_BSC: Array

    def write(self, entries: "LatentCache", at: Array) -> "LatentCache":
        return LatentCache(put(self.latent_BSR, entries.latent_BSR, at), put(self.index_key_BSC, entries.index_key_BSC, at))

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "LatentCache":
        dtype, indexed = jnp.dtype(config.dtype), config.indexer.width if config.indexer.heads else 0
        latent = config.attention.latent_rank + config.attention.rope_width
        return cls(jnp.zeros((batch, slots, latent), dtype), jnp.zeros((batch, slots, indexed), dtype))


@flax.struct.dataclass
class KeyValueCache:
    """Keys, normalised and rotated, and values of the K key-value heads."""

    k_BSKH: Array
    v_BSKH: Array

    def write(self, entries: "KeyValueCache", at: Array) -> "KeyValueCache":
        return KeyValueCache(put(self.k_BSKH, entries.k_BSKH, at), put(self.v_BSKH, entries.v_BSKH, at))

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "KeyValueCache":
        zeros = jnp.zeros((batch, slots, config.gqa.kv_heads, config.gqa.head_width), config.dtype)
        return cls(zeros, zeros)


@flax.struct.dataclass
class DeltaCache:
    """state_BNHV: what each value head has stored under its keys, float32; recent_*: the convolutions' last inputs [B, taps - 1, heads, width]."""

    state_BNHV: Array
    recent_q: Array
    recent_k: Array
    recent_v: Array

    def write(self, entries: "DeltaCache", at: Array) -> "DeltaCache":
        """The newer state: it has the older in it."""
        del at
        return jax.tree.map(lambda old, new: new.astype(old.dtype), self, entries)

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "DeltaCache":
        del slots
        d = config.delta

        def recent(heads: int, width: int) -> Array:
            return jnp.zeros((batch, d.taps - 1, heads, width), config.dtype)

        state_BNHV = jnp.zeros((batch, d.value_heads, d.key_width, d.value_width), jnp.float32)
        keys = recent(d.key_heads, d.key_width)
        return cls(state_BNHV, keys, keys, recent(d.value_heads, d.value_width))


AttentionCache = LatentCache | KeyValueCache | DeltaCache
ATTENTION_CACHES: dict[str, type[AttentionCache]] = {"mla": LatentCache, "gqa": KeyValueCache, "delta": DeltaCache}


@flax.struct.dataclass
class LayerCache:
    """One layer: its attention's, and recent_BKD, what the convolution before attention has yet to reach back to (K = 0: none)."""

    attention: AttentionCache
    recent_BKD: Array

    def write(self, entries: "LayerCache", at: Array) -> "LayerCache":
        """With these entries of T tokens at slots at .. at + T - 1; of what is recent they have the newer."""
        return LayerCache(self.attention.write(entries.attention, at), entries.recent_BKD.astype(self.recent_BKD.dtype))


@flax.struct.dataclass
class Cache:
    """All layers, the segment of each slot (0: nothing there, or padding), the next position of each row, and the number of slots filled."""

    layers: tuple[LayerCache, ...]
    segments_BS: Array
    next_position_B: Array
    length: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "Cache":
        recent_BKD = jnp.zeros((batch, max(config.canon - 1, 0), config.width), config.dtype)
        layers = tuple(LayerCache(ATTENTION_CACHES[kind.attention].empty(config, batch, slots), recent_BKD) for kind in config.kinds)
        return cls(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32))
