"""From a value per token to one number for the batch: who counts how much.

An aggregation is a total and a weight, each a sum over rows. The trainer adds the weights of the
whole batch first (they depend on the mask alone), then differentiates the total of each microbatch
over that one global weight, so the gradient does not depend on how the batch was cut, padded or
laid out.

Rows without any completion token (they fill up a batch) count for nothing, in the total and in the
weight.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from train.mean import Mean


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """`total(values_BT, mask_BT)` and `weight(mask_BT)`, float32 scalars.

    mask_BT, bool or 0 and 1, is true on completion tokens. Values elsewhere are never read, be they
    NaN.
    """

    total: Callable[[Array, Array], Array]
    weight: Callable[[Array], Array]

    def __call__(self, values_BT: Array, mask_BT: Array) -> Mean:
        return Mean(self.total(values_BT, mask_BT), self.weight(mask_BT))


def _row_sums(values_BT: Array, mask_BT: Array) -> Array:
    return jnp.sum(jnp.where(mask_BT, values_BT.astype(jnp.float32), 0), axis=1)


def _lengths(mask_BT: Array) -> Array:
    return jnp.sum(mask_BT, axis=1, dtype=jnp.float32)


def _rows(mask_BT: Array) -> Array:
    return jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


def _sum_of_sequence_means(values_BT: Array, mask_BT: Array) -> Array:
    return jnp.sum(_row_sums(values_BT, mask_BT) / jnp.maximum(_lengths(mask_BT), 1))


mean_of_sequence_means = Aggregation(total=_sum_of_sequence_means, weight=_rows)
"""Every completion counts the same, whatever its length: 1/B sum_i 1/|o_i| sum_t (GRPO, arXiv 2402.03300, eq. 3; "seq-mean-token-mean")."""

token_mean = Aggregation(
    total=lambda values_BT, mask_BT: jnp.sum(_row_sums(values_BT, mask_BT)),
    weight=lambda mask_BT: jnp.sum(_lengths(mask_BT)),
)
"""Every token of the batch counts the same: 1/sum_i |o_i| sum_i sum_t (DAPO, arXiv 2503.14476, eq. 8)."""


def sum_over(divisor: float) -> Aggregation:
    """Every token counts the same, by a constant: 1/B sum_i 1/divisor sum_t (Dr. GRPO, arXiv
    2503.20783, section 3.2; "seq-mean-token-sum-norm").

    Args:
      divisor: tokens; the longest completion that can be sampled. Never the width of the batch,
        which would make padding matter.
    """
    return Aggregation(
        total=lambda values_BT, mask_BT: jnp.sum(_row_sums(values_BT, mask_BT)) / divisor,
        weight=_rows,
    )
