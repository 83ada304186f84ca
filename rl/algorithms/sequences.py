"""Which completion a token belongs to, and sums over each, wherever they stand in a batch.

A row of a batch has one completion or several (rl/packing.py), never a part of one. So sums over a
completion are sums within a row, and do not depend on how rows are cut into microbatches.
"""

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Sequences:
    """Says of the tokens [B, T] that are learnt from which sequence of their row they belong to.

    Attributes:
      numbers_BT: int32 from 1 to T, as segments have; 0 on tokens that are not learnt from.
      rows_B: int32, the sequences that a row has, those included of which no token is learnt from.
      group_tokens_BT: float32, the tokens that all completions of the same prompt have in the whole
        step; None where nothing asks for it.
    """

    numbers_BT: Array
    rows_B: Array
    group_tokens_BT: Array | None = None

    @property
    def mask_BT(self) -> Array:
        """Which tokens are learnt from, bool."""
        return self.numbers_BT > 0

    @property
    def lengths_BT(self) -> Array:
        """The number of tokens of each token's sequence, float32, at least 1."""
        return jnp.maximum(self.sum(jnp.ones(self.numbers_BT.shape, jnp.float32)), 1.0)

    def sum(self, values_BT: Array) -> Array:
        """Sums values over each sequence: at every token of it its sum, elsewhere 0; float32."""
        return self._at_tokens(self._sums(values_BT))

    def mean(self, values_BT: Array) -> Array:
        """Returns at every token the mean over its sequence, elsewhere 0; float32."""
        return self.sum(values_BT) / self.lengths_BT

    def largest(self, values_BT: Array) -> Array:
        """Returns at every token the largest value of its sequence, elsewhere 0; float32."""
        numbers_BT, rows_B1 = self._places()
        values_BT = jnp.where(self.mask_BT, values_BT.astype(jnp.float32), -jnp.inf)
        least_BS = jnp.full((numbers_BT.shape[0], numbers_BT.shape[1] + 1), -jnp.inf)
        largest_BS = least_BS.at[rows_B1, numbers_BT].max(values_BT)
        return self._at_tokens(jnp.where(jnp.isfinite(largest_BS), largest_BS, 0.0))

    def count(self) -> Array:
        """Returns how many sequences have a token that is learnt from, a float32 scalar."""
        return jnp.sum(self._sums(self.mask_BT) > 0, dtype=jnp.float32)

    def _places(self) -> tuple[Array, Array]:
        numbers_BT = self.numbers_BT.astype(jnp.int32)
        return numbers_BT, jnp.arange(numbers_BT.shape[0])[:, None]

    def _sums(self, values_BT: Array) -> Array:
        """Sums over each sequence, [B, T + 1] by its number; that of number 0 is 0."""
        numbers_BT, rows_B1 = self._places()
        values_BT = jnp.where(self.mask_BT, values_BT.astype(jnp.float32), 0.0)
        nothing_BS = jnp.zeros((numbers_BT.shape[0], numbers_BT.shape[1] + 1), jnp.float32)
        return nothing_BS.at[rows_B1, numbers_BT].add(values_BT)

    def _at_tokens(self, of_sequences_BS: Array) -> Array:
        numbers_BT, _ = self._places()
        return jnp.take_along_axis(of_sequences_BS, numbers_BT, axis=1)
