"""The caches of the types of attention: what each remembers of the tokens read so far.

| attention | remembers | grows |
|---|---|---|
| mla | the normalised key-value latent, and the indexer's keys | with every token |
| gqa | keys and values of the few key-value heads | with every token |
| delta | a matrix a head, and the last few inputs of its convolutions | not at all |

Where decoding reads only the keys with a share of attention's probability (`attention_top_p` below
1; Twilight, arXiv 2502.02770), attention without an indexer also remembers its keys in four bits,
to estimate by. Which function reads a cache is chosen in model/attention/table.py.
"""

import dataclasses
from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels import sparse_decode
from kernels.device import platform
from model.attention.int4 import Int4, quantise
from model.config import ModelConfig

# Channels of a latent that share a range in four bits: DeepSeek's rotated key then has its own.
LATENT_GROUP = 64


class AttentionCache(Protocol):
    """Remembers tokens for one layer's attention, or has the entries of some on their way to it."""

    def write(self, entries: Self, index_BT: Array) -> Self:
        """Returns the cache with the entry of each token at its index, see `write_tokens`."""
        ...

    def after(self, count_B: Array, read: int) -> Self:
        """Returns the cache as it was after the first `count_B` of the `read` tokens just read.

        They were read with `TokenInfo.every`.
        """
        ...

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, stage: str, attention_top_p: float
    ) -> Self:
        """Returns a cache of zeros, to be read in this stage, with this share of attention."""
        ...


def write_tokens(old_BSX: Array, new_BTX: Array, index_BT: Array) -> Array:
    """Returns the array with each entry at its index in the row; past the end it writes none."""

    def write_row(old_SX: Array, new_TX: Array, index_T: Array) -> Array:
        return old_SX.at[index_T].set(new_TX, mode="drop")

    return jax.vmap(write_row)(old_BSX, new_BTX.astype(old_BSX.dtype), index_BT)


def windows(x_BSX: Array, start_B: Array, length: int) -> Array:
    """Returns `length` entries of every row from its own start on."""

    def window(x_SX: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x_SX, start, length)

    return jax.vmap(window)(x_BSX, start_B)


def write_int4(old: Int4 | None, keys_BTX: Array, group_size: int, index_BT: Array) -> Int4 | None:
    """Does the same for keys in four bits, in groups of channels; None stays None."""
    if old is None:
        return None
    new = quantise(keys_BTX.astype(old.low.dtype), group_size)
    return jax.tree.map(lambda old_BSX, new_BTX: write_tokens(old_BSX, new_BTX, index_BT), old, new)


@flax.struct.dataclass
class LatentCache:
    """The cache of multi-head latent attention.

    latent_BSR: the normalised key-value latent and after it the rotated shared key; in the layout
      "tiles" as [B, S, n, 2, 128].
    index_key_BSC: the indexer's keys; C is 0 without an indexer.
    estimate: the latents in four bits, where there is no indexer to estimate by.
    attention_top_p: the share of attention's probability that decoding reads.
    layout: "rows" | "tiles", see `sparse_decode.to_tiles`.
    """

    latent_BSR: Array
    index_key_BSC: Array
    estimate: Int4 | None = None
    attention_top_p: float = flax.struct.field(pytree_node=False, default=1.0)
    layout: str = flax.struct.field(pytree_node=False, default="rows")

    def write(self, entries: "LatentCache", index_BT: Array) -> "LatentCache":
        """Returns the cache with the new entries, which are rows, in its own layout."""
        new_BTR = entries.latent_BSR
        if self.layout == "tiles":
            new_BTR = sparse_decode.to_tiles(new_BTR)
        return dataclasses.replace(
            self,
            latent_BSR=write_tokens(self.latent_BSR, new_BTR, index_BT),
            index_key_BSC=write_tokens(self.index_key_BSC, entries.index_key_BSC, index_BT),
            estimate=write_int4(self.estimate, entries.latent_BSR, LATENT_GROUP, index_BT),
        )

    def after(self, count_B: Array, read: int) -> "LatentCache":
        """Returns itself: what stands behind the last token means nothing."""
        del count_B, read
        return self

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, stage: str, attention_top_p: float
    ) -> "LatentCache":
        """Returns a cache of zeros, in the layout that `sparse_decode.in_tiles` chooses."""
        dtype, indexer = jnp.dtype(config.dtype), config.indexer
        index_width = indexer.head_dim if indexer.n_heads else 0
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        latent_BSR = jnp.zeros((batch, capacity, width), dtype)
        sparse = stage == "sparse" and indexer.n_heads > 0
        estimate = (
            quantise(latent_BSR, LATENT_GROUP) if attention_top_p < 1 and not sparse else None
        )
        layout = "rows"
        if sparse and sparse_decode.in_tiles(platform(), capacity, indexer.topk):
            latent_BSR, layout = sparse_decode.to_tiles(latent_BSR), "tiles"
        index_key_BSC = jnp.zeros((batch, capacity, index_width), dtype)
        return cls(latent_BSR, index_key_BSC, estimate, attention_top_p, layout)


@flax.struct.dataclass
class KeyValueCache:
    """The cache of grouped-query attention, of K key-value heads.

    k_BSKH: the keys, normalised and rotated.
    v_BSKH: the values.
    estimate: the keys in four bits, a range for each token and head.
    attention_top_p: the share of attention's probability that decoding reads.
    """

    k_BSKH: Array
    v_BSKH: Array
    estimate: Int4 | None = None
    attention_top_p: float = flax.struct.field(pytree_node=False, default=1.0)

    def write(self, entries: "KeyValueCache", index_BT: Array) -> "KeyValueCache":
        """Returns the cache with the new keys and values, and the keys' four bits."""
        return dataclasses.replace(
            self,
            k_BSKH=write_tokens(self.k_BSKH, entries.k_BSKH, index_BT),
            v_BSKH=write_tokens(self.v_BSKH, entries.v_BSKH, index_BT),
            estimate=write_int4(self.estimate, entries.k_BSKH, entries.k_BSKH.shape[-1], index_BT),
        )

    def after(self, count_B: Array, read: int) -> "KeyValueCache":
        """Returns itself: what stands behind the last token means nothing."""
        del count_B, read
        return self

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, stage: str, attention_top_p: float
    ) -> "KeyValueCache":
        """Returns a cache of zeros, the same for every stage: all read the same keys."""
        del stage
        g = config.gqa
        zeros = jnp.zeros((batch, capacity, g.num_key_value_heads, g.head_dim), config.dtype)
        estimate = quantise(zeros, g.head_dim) if attention_top_p < 1 else None
        return cls(zeros, zeros, estimate, attention_top_p)


@flax.struct.dataclass
class DeltaCache:
    """The cache of Gated DeltaNet, of one size however many tokens are read.

    state_BNHV: what each of the N value heads has stored under its keys, float32.
    recent_q, recent_k, recent_v: the last inputs of the convolutions, [B, kernel size - 1, heads,
      width]; None where a sequence begins.
    """

    state_BNHV: Array
    recent_q: Array | None
    recent_k: Array | None
    recent_v: Array | None

    def write(self, entries: "DeltaCache", index_BT: Array) -> "DeltaCache":
        """Returns the newer state: it has the older in it, and padding changes neither."""
        del index_BT
        return jax.tree.map(lambda old, new: new.astype(old.dtype), self, entries)

    def after(self, count_B: Array, read: int) -> "DeltaCache":
        """Returns the state after so many tokens, of one that has it after every token."""
        recent = (
            windows(x_BSX, count_B, x_BSX.shape[1] - read)
            for x_BSX in (self.recent_q, self.recent_k, self.recent_v)
            if x_BSX is not None
        )
        return DeltaCache(windows(self.state_BNHV, count_B, 1)[:, 0], *recent)

    @classmethod
    def begin(cls, config: ModelConfig, batch: int) -> "DeltaCache":
        """Returns the state in front of a sequence: zeros, and nothing recent."""
        d = config.delta
        shape = (batch, d.num_value_heads, d.key_head_dim, d.value_head_dim)
        return cls(jnp.zeros(shape, jnp.float32), None, None, None)

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, stage: str, attention_top_p: float
    ) -> "DeltaCache":
        """Returns a state of zeros; it holds all there is, whatever the rest is."""
        del capacity, stage, attention_top_p
        d = config.delta

        def recent(heads: int, width: int) -> Array:
            return jnp.zeros((batch, d.conv_kernel_dim - 1, heads, width), config.dtype)

        keys = recent(d.num_key_heads, d.key_head_dim)
        values = recent(d.num_value_heads, d.value_head_dim)
        return cls(cls.begin(config, batch).state_BNHV, keys, keys, values)
