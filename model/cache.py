"""The cache of decoding: what each layer's attention needs of the tokens read so far.

The caches of the types of attention are in model/attention/caches.py.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.caches import AttentionCache, windows
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

    def after(self, count_B: Array, read: int) -> "LayerCache":
        """Returns the cache after some of the tokens just read, see `AttentionCache.after`."""
        P = self.recent_BPD.shape[1] - read
        recent_BPD = windows(self.recent_BPD, count_B, P) if P > 0 else self.recent_BPD[:, :0]
        return LayerCache(self.attention.after(count_B, read), recent_BPD)


@flax.struct.dataclass
class DraftCache:
    """What the MTP modules remember of B rows, to draft D tokens at a time (model/drafts.py).

    layers: a cache for each module. It holds all positions but the row's last W = D + 1, which the
      modules read when they draft.
    further_BWD: what the first module reads at these W positions, `Reading.further_BTD`.
    tokens_BW: the tokens there.
    known_B: how many of them are known, the last ones; fewer than W where the row is shorter, or
      where tokens were taken back.
    """

    layers: tuple[LayerCache, ...]
    further_BWD: Array
    tokens_BW: Array
    known_B: Array

    @property
    def depth(self) -> int:
        """D, how many tokens are drafted at a time."""
        return len(self.layers)

    def slid(self, further_BTD: Array, tokens_BT: Array, count_B: Array) -> "DraftCache":
        """Returns the cache whose last positions are `count_B` further on.

        Args:
          further_BTD, tokens_BT: of the next positions, T of them.
        """
        W = self.tokens_BW.shape[1]
        further_BSD = jnp.concatenate([self.further_BWD, further_BTD], axis=1)
        tokens_BS = jnp.concatenate([self.tokens_BW, tokens_BT], axis=1)
        return dataclasses.replace(
            self,
            further_BWD=windows(further_BSD, count_B, W),
            tokens_BW=windows(tokens_BS, count_B, W),
            known_B=jnp.minimum(self.known_B + count_B, W),
        )


@flax.struct.dataclass
class Cache:
    """The cache of a model: B rows of as many tokens as each has read, no two rows alike.

    layers: a cache for each layer of the trunk.
    length_B: the tokens that each row has read. The token at position p of a row is at index p;
      what stands behind the last means nothing.
    capacity: for how many tokens a row has room.
    drafts: what the MTP modules remember, where they draft.
    """

    layers: tuple[LayerCache, ...]
    length_B: Array
    capacity: int = flax.struct.field(pytree_node=False)
    drafts: DraftCache | None = None

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        stage: str,
        attention_top_p: float = 1.0,
        drafts: int = 0,
    ) -> "Cache":
        """Returns a cache of `batch` rows with room for `capacity` tokens.

        Args:
          stage: the stage that it is read in, "dense" or "sparse".
          attention_top_p: the share of attention's probability that decoding reads.
          drafts: D, how many tokens the MTP modules draft at a time; they remember too.
        """
        P = max(config.canon_kernel_size - 1, 0)

        def layer(attention: str) -> LayerCache:
            cache = ATTENTION_TYPES[attention].cache
            return LayerCache(
                cache.empty(config, batch, capacity, stage, attention_top_p),
                jnp.zeros((batch, P, config.hidden_size), config.dtype),
            )

        layers = tuple(layer(kind.attention) for kind in config.kinds)
        drafting = None
        if drafts:
            drafting = DraftCache(
                tuple(layer(config.mtp_kind.attention) for _ in range(drafts)),
                jnp.zeros((batch, drafts + 1, config.hidden_size), config.dtype),
                jnp.zeros((batch, drafts + 1), jnp.int32),
                jnp.zeros((batch,), jnp.int32),
            )
        return cls(layers, jnp.zeros((batch,), jnp.int32), capacity, drafting)

    def tokens(self, count_B: Array, width: int, stage: str, every: bool = False) -> TokenInfo:
        """Describes the next tokens [B, width] of every row, of which the first `count_B` are real.

        Args:
          stage, every: as in `TokenInfo`.
        """
        real_BT = jnp.arange(width) < count_B[:, None]
        return token_info(self.length_B, real_BT, self.capacity, stage, every)

    def after(self, count_B: Array, read: int) -> "Cache":
        """Returns the cache after the first `count_B` of the `read` tokens it was given last.

        `drafts` stays as it is.
        """
        layers = tuple(layer.after(count_B, read) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, length_B=self.length_B + count_B)

    def cut(self, length_B: Array) -> "Cache":
        """Returns the cache with fewer tokens, which only one without a recurrent state can have.

        What the last tokens were, which modules draft from, is not known then: where any was taken
        back the next tokens to be read begin `drafts.depth + 1` before.
        """
        drafts = self.drafts
        if drafts:
            known_B = jnp.where(length_B < self.length_B, 0, drafts.known_B)
            drafts = dataclasses.replace(drafts, known_B=known_B)
        return dataclasses.replace(self, length_B=length_B, drafts=drafts)

    def take(self, row_R: Array) -> "Cache":
        """Returns the cache of some rows; of a number past the last row, any of them."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, row_R, axis=0, mode="clip"), self)

    def put(self, row_R: Array, rows: "Cache") -> "Cache":
        """Returns the cache with other rows at these numbers; past the last row none is written."""
        return jax.tree.map(lambda leaf, new: leaf.at[row_R].set(new, mode="drop"), self, rows)


def token_info(
    start_B: Array, real_BT: Array, capacity: int, stage: str, every: bool = False
) -> TokenInfo:
    """Describes tokens of a cache's rows; each attends to those of its row up to itself.

    Args:
      start_B: the position of each row's first token.
      real_BT: bool, which of them there are; the others are padding.
      capacity: for how many tokens a row has room.
      stage, every: as in `TokenInfo`.
    """
    positions_BT = start_B[:, None] + jnp.arange(real_BT.shape[1])
    return TokenInfo(
        positions_BT,
        real_BT.astype(jnp.int32),
        stage,
        allowed_BTS=jnp.arange(capacity) <= positions_BT[..., None],
        index_BT=jnp.where(real_BT, positions_BT, capacity),
        every=every,
    )
