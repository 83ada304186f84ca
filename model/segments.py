"""Packed rows: which tokens of a row belong together, and which may see which.

A row holds several documents one after the other. `segments_BT` numbers them from 1; 0 is padding.
"""

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class TokenInfo:
    """Describes the tokens of every layer, beside their hidden states.

    positions_BT: the position of each token in its segment, for RoPE.
    segments_BT: the segment of each token; 0 is padding.
    stage: "dense" | "warmup" | "sparse", see `model.attention.reference.attend_expanded`.
    allowed_BTS: while decoding, the places in the cache that each token may attend to; None over
      whole sequences, where positions and segments say it.
    index_BT: while decoding, the place in its row of the cache that each token is written to; past
      the end for padding, which is not written.
    every: while decoding, whether a recurrent cache keeps its state after every one of the tokens,
      so that the last may be taken back (`model.cache.Cache.after`).
    """

    positions_BT: Array
    segments_BT: Array
    stage: str = flax.struct.field(pytree_node=False)
    allowed_BTS: Array | None = None
    index_BT: Array | None = None
    every: bool = flax.struct.field(pytree_node=False, default=False)


def shift_left(x_BT: Array, by: int) -> Array:
    """Returns x[t + by] at t, zeros at the end."""
    return jnp.pad(x_BT[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x_BT.ndim - 2))


def same_segment(segments_BT: Array, ahead: int) -> Array:
    """Tells whether the token `ahead` places on is of the same segment. [B, T] bool."""
    return (shift_left(segments_BT, ahead) == segments_BT) & (segments_BT > 0)


def causal_mask(query_segments_BT: Array, query_index_T: Array, key_segments_BS: Array) -> Array:
    """Returns which keys each query may see: earlier ones of its segment, and itself. [B, T, S].

    Args:
      query_segments_BT: segments of the queries; those of 0, padding, see nothing.
      query_index_T: where the queries stand in the row, whose keys stand at 0 .. S - 1.
      key_segments_BS: segments of the keys.
    """
    query_segments_BT1 = query_segments_BT[..., None]
    return (
        (query_index_T[:, None] >= jnp.arange(key_segments_BS.shape[1]))
        & (query_segments_BT1 == key_segments_BS[:, None])
        & (query_segments_BT1 > 0)
    )
