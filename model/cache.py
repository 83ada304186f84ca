"""What decoding remembers of the tokens read so far: per layer what its attention needs, the last
few hidden states for the convolution, and nothing else.

| attention | remembers | grows |
|---|---|---|
| mla | the normalised key-value latent, and the indexer's keys | with every token |
| gqa | keys and values of the few key-value heads | with every token |
| delta | a matrix a head, and the last few inputs of its convolutions | not at all |

Where decoding reads only a share of attention's mass (`attention_mass` below 1, kernels/top_p.py),
attention without an indexer also remembers its keys in four bits, to estimate by.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels import sparse_decode
from kernels.device import platform
from model.attention.int4 import Int4, quantise
from model.config import ModelConfig

# channels of a latent with a range of their own in four bits: DeepSeek's rotated key has its own
# then
LATENT_GROUP = 64


def put(old_BSX: Array, new_BTX: Array, at: Array) -> Array:
    """New entries at slots at .. at + T - 1, the same slots in every row."""
    return jax.lax.dynamic_update_slice_in_dim(old_BSX, new_BTX.astype(old_BSX.dtype), at, axis=1)


def put_int4(old: Int4 | None, keys_BTX: Array, size: int, at: Array) -> Int4 | None:
    """The same for keys kept in four bits, in groups of `size` channels; None where they are
    not.
    """
    return (
        None
        if old is None
        else jax.tree.map(
            lambda old_BSX, new_BTX: put(old_BSX, new_BTX, at),
            old,
            quantise(keys_BTX.astype(old.low.dtype), size),
        )
    )


@flax.struct.dataclass
class LatentCache:
    """latent_BSR holds the normalised key-value latent and after it the rotated shared key, where
    `sparse_decode.in_tiles` says so as tiles [B, S, n, 2, 128]; index_key_BSC the indexer's keys (C
    = 0: none); estimate the latents in four bits, where there is no indexer to estimate by.
    """

    latent_BSR: Array
    index_key_BSC: Array
    estimate: Int4 | None = None
    attention_top_p: float = flax.struct.field(pytree_node=False, default=1.0)

    def write(self, entries: "LatentCache", at: Array) -> "LatentCache":
        tiled = self.latent_BSR.ndim == 5
        return self.replace(
            latent_BSR=put(
                self.latent_BSR,
                sparse_decode.to_tiles(entries.latent_BSR) if tiled else entries.latent_BSR,
                at,
            ),
            index_key_BSC=put(self.index_key_BSC, entries.index_key_BSC, at),
            estimate=put_int4(self.estimate, entries.latent_BSR, LATENT_GROUP, at),
        )

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, stage: str, attention_mass: float
    ) -> "LatentCache":
        dtype, indexed = (
            jnp.dtype(config.dtype),
            config.indexer.head_dim if config.indexer.n_heads else 0,
        )
        latent_BSR = jnp.zeros(
            (batch, slots, config.mla.kv_lora_rank + config.mla.qk_rope_head_dim), dtype
        )
        sparse = stage == "sparse" and indexed > 0
        estimate = quantise(latent_BSR, LATENT_GROUP) if attention_mass < 1 and not sparse else None
        if sparse and sparse_decode.in_tiles(platform(), slots, config.indexer.topk):
            latent_BSR = sparse_decode.to_tiles(latent_BSR)
        return cls(latent_BSR, jnp.zeros((batch, slots, indexed), dtype), estimate, attention_mass)


@flax.struct.dataclass
class KeyValueCache:
    """Keys, normalised and rotated, and values of the K key-value heads; estimate the keys in four
    bits, a range a token and head.
    """

    k_BSKH: Array
    v_BSKH: Array
    estimate: Int4 | None = None
    attention_top_p: float = flax.struct.field(pytree_node=False, default=1.0)

    def write(self, entries: "KeyValueCache", at: Array) -> "KeyValueCache":
        return self.replace(
            k_BSKH=put(self.k_BSKH, entries.k_BSKH, at),
            v_BSKH=put(self.v_BSKH, entries.v_BSKH, at),
            estimate=put_int4(self.estimate, entries.k_BSKH, entries.k_BSKH.shape[-1], at),
        )

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, stage: str, attention_mass: float
    ) -> "KeyValueCache":
        del stage
        zeros = jnp.zeros(
            (batch, slots, config.gqa.num_key_value_heads, config.gqa.head_dim), config.dtype
        )
        return cls(
            zeros,
            zeros,
            quantise(zeros, config.gqa.head_dim) if attention_mass < 1 else None,
            attention_mass,
        )


@flax.struct.dataclass
class DeltaCache:
    """state_BNHV: what each value head has stored under its keys, float32; recent_*: the
    convolutions' last inputs [B, taps - 1, heads, width].
    """

    state_BNHV: Array
    recent_q: Array
    recent_k: Array
    recent_v: Array

    def write(self, entries: "DeltaCache", at: Array) -> "DeltaCache":
        """The newer state: it has the older in it."""
        del at
        return jax.tree.map(lambda old, new: new.astype(old.dtype), self, entries)

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, stage: str, attention_mass: float
    ) -> "DeltaCache":
        del slots, stage, attention_mass
        d = config.delta

        def recent(heads: int, width: int) -> Array:
            return jnp.zeros((batch, d.conv_kernel_dim - 1, heads, width), config.dtype)

        state_BNHV = jnp.zeros(
            (batch, d.num_value_heads, d.key_head_dim, d.value_head_dim), jnp.float32
        )
        keys = recent(d.num_key_heads, d.key_head_dim)
        return cls(state_BNHV, keys, keys, recent(d.num_value_heads, d.value_head_dim))


AttentionCache = LatentCache | KeyValueCache | DeltaCache
ATTENTION_CACHES: dict[str, type[AttentionCache]] = {
    "mla": LatentCache,
    "gqa": KeyValueCache,
    "delta": DeltaCache,
}


@flax.struct.dataclass
class LayerCache:
    """One layer: its attention's, and recent_BKD, what the convolution before attention has yet to
    reach back to (K = 0: none).
    """

    attention: AttentionCache
    recent_BKD: Array

    def write(self, entries: "LayerCache", at: Array) -> "LayerCache":
        """With these entries of T tokens at slots at .. at + T - 1; of what is recent they have the
        newer.
        """
        return LayerCache(
            self.attention.write(entries.attention, at),
            entries.recent_BKD.astype(self.recent_BKD.dtype),
        )


@flax.struct.dataclass
class Cache:
    """All layers, the segment of each slot (0: nothing there, or padding), the next position of
    each row, and the number of slots filled.
    """

    layers: tuple[LayerCache, ...]
    segments_BS: Array
    next_position_B: Array
    length: Array

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, stage: str, attention_mass: float = 1.0
    ) -> "Cache":
        recent_BKD = jnp.zeros(
            (batch, max(config.canon_kernel_size - 1, 0), config.hidden_size), config.dtype
        )
        layers = tuple(
            LayerCache(
                ATTENTION_CACHES[kind.attention].empty(config, batch, slots, stage, attention_mass),
                recent_BKD,
            )
            for kind in config.kinds
        )
        return cls(
            layers,
            jnp.zeros((batch, slots), jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((), jnp.int32),
        )
