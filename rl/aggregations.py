"""From a value per token to one number for the batch: how much each completion and token counts.

An aggregation gives the total and the weight of a `Mean` (train/mean.py), each a sum over
sequences. The trainer adds the weights of the whole batch first (they depend on what was sampled
alone), then differentiates the total of each microbatch over that one global weight, so the
gradient does not depend on how the batch is cut, padded or packed.

Sequences without any sampled token, and rows of padding, count for nothing, in the total and in the
weight.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """The two halves of a mean over the sequences of B rows of T tokens.

    total: (values_BT, sequences_BT) -> float32 scalar.
    weight: sequences_BT -> float32 scalar.

    sequences_BT says of sampled tokens which sequence of the row they belong to: a number from 1 to
    T, as segments have; 0 elsewhere. Where a row is a sequence it is the mask. Values where it is 0
    are never read, be they NaN.
    """

    total: Callable[[Array, Array], Array]
    weight: Callable[[Array], Array]


def _sum(values_BT: Array, sequences_BT: Array) -> Array:
    return jnp.sum(jnp.where(sequences_BT > 0, values_BT.astype(jnp.float32), 0))


def _lengths(sequences_BT: Array) -> Array:
    """Returns the number of sampled tokens of each sequence, [B, T + 1]; of number 0 it is 0."""
    sequences_BT = sequences_BT.astype(jnp.int32)
    rows_B1 = jnp.arange(sequences_BT.shape[0])[:, None]
    nothing_BS = jnp.zeros((sequences_BT.shape[0], sequences_BT.shape[1] + 1), jnp.float32)
    return nothing_BS.at[rows_B1, sequences_BT].add(sequences_BT > 0)


def _count(sequences_BT: Array) -> Array:
    return jnp.sum(_lengths(sequences_BT) > 0, dtype=jnp.float32)


def _sum_of_sequence_means(values_BT: Array, sequences_BT: Array) -> Array:
    sequences_BT = sequences_BT.astype(jnp.int32)
    lengths_BT = jnp.take_along_axis(_lengths(sequences_BT), sequences_BT, axis=1)
    return _sum(values_BT / jnp.maximum(lengths_BT, 1), sequences_BT)


mean_of_sequence_means = Aggregation(total=_sum_of_sequence_means, weight=_count)
"""Every completion counts the same, whatever its length (GRPO, arXiv 2402.03300, eq. 3).

    1/B sum_i 1/|o_i| sum_t x[i, t]

Other systems call it "seq-mean-token-mean".
"""

token_mean = Aggregation(
    total=_sum,
    weight=lambda sequences_BT: jnp.sum(sequences_BT > 0, dtype=jnp.float32),
)
"""Every token of the batch counts the same (DAPO, arXiv 2503.14476, eq. 8).

    1/sum_i |o_i|  sum_i sum_t x[i, t]
"""


def sum_over(divisor: float) -> Aggregation:
    """Builds Dr.GRPO's aggregation: every token counts the same, by a constant divisor.

        1/B sum_i 1/divisor sum_t x[i, t]

    Where GRPO divides by the length |o_i|, Dr.GRPO divides by a constant (arXiv 2503.20783,
    section 3.2). Other systems call it "seq-mean-token-sum-norm".

    Args:
      divisor: tokens; the longest completion that can be sampled. Never the width of the batch,
        which would make padding matter.
    """
    return Aggregation(
        total=lambda values_BT, sequences_BT: _sum(values_BT, sequences_BT) / divisor,
        weight=_count,
    )
