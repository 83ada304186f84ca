"""From a value per token to one number for the batch: how much each completion and token counts.

An aggregation gives the total and the weight of a `Mean` (train/mean.py), each a sum over rows. The
trainer adds the weights of the whole batch first (they depend on the mask alone), then
differentiates the total of each microbatch over that one global weight, so the gradient does not
depend on how the batch is cut, padded or laid out.

Rows without any sampled token (they fill up a batch) count for nothing, in the total and in the
weight.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """The two halves of a mean over B rows of T tokens.

    total: (values_BT, mask_BT) -> float32 scalar.
    weight: mask_BT -> float32 scalar.

    mask_BT, bool or 0 and 1, is true on sampled tokens. Values elsewhere are never read, be they
    NaN.
    """

    total: Callable[[Array, Array], Array]
    weight: Callable[[Array], Array]


def _row_sums(values_BT: Array, mask_BT: Array) -> Array:
    return jnp.sum(jnp.where(mask_BT, values_BT.astype(jnp.float32), 0), axis=1)


def _lengths(mask_BT: Array) -> Array:
    return jnp.sum(mask_BT, axis=1, dtype=jnp.float32)


def _rows(mask_BT: Array) -> Array:
    return jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


def _sum_of_sequence_means(values_BT: Array, mask_BT: Array) -> Array:
    return jnp.sum(_row_sums(values_BT, mask_BT) / jnp.maximum(_lengths(mask_BT), 1))


mean_of_sequence_means = Aggregation(total=_sum_of_sequence_means, weight=_rows)
"""Every completion counts the same, whatever its length (GRPO, arXiv 2402.03300, eq. 3).

    1/B sum_i 1/|o_i| sum_t x[i, t]

Other systems call it "seq-mean-token-mean".
"""

token_mean = Aggregation(
    total=lambda values_BT, mask_BT: jnp.sum(_row_sums(values_BT, mask_BT)),
    weight=lambda mask_BT: jnp.sum(_lengths(mask_BT)),
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
        total=lambda values_BT, mask_BT: jnp.sum(_row_sums(values_BT, mask_BT)) / divisor,
        weight=_rows,
    )
