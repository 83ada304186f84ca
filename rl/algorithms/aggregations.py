"""From a value per token to one number for the batch: how much each completion and token counts.

An aggregation gives the total and the weight of a `Mean` (train/mean.py), each a sum over
sequences. The trainer adds the weights of the whole batch first (they depend on what was sampled
alone), then differentiates the total of each microbatch over that one global weight, so the
gradient does not depend on how the batch is cut, padded or packed.

Sequences of which no token is learnt from, and rows of padding, count for nothing: neither in the
total nor in the weight. With `count = "all"` the former count in the weight, as 0 in the mean.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from rl.algorithms.sequences import Sequences

COUNTS = ("learnt", "all")


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """The two halves of a mean over the sequences of B rows of T tokens.

    share: sequences -> how much each token counts, [B, T] or a scalar.
    weight: sequences -> float32 scalar.
    needs: as `rl.algorithms.tokens.needing` notes it.
    """

    share: Callable[[Sequences], Array | float]
    weight: Callable[[Sequences], Array]
    needs: frozenset[str] = frozenset()

    def total(self, values_BT: Array, sequences: Sequences) -> Array:
        """Returns the weighted sum of values [B, T], a float32 scalar.

        Values of tokens that are not learnt from are never read, be they NaN.
        """
        values_BT = jnp.where(sequences.mask_BT, values_BT.astype(jnp.float32), 0.0)
        return jnp.sum(values_BT * self.share(sequences))


def sequence_mean(*, count: str = "learnt") -> Aggregation:
    """Builds GRPO's mean: every completion counts the same, whatever its length.

        1/B sum_i 1/|o_i| sum_t x[i, t]

    (GRPO, arXiv 2402.03300, eq. 3.) Other systems call it "seq-mean-token-mean".

    Args:
      count: B counts the completions of which any token is "learnt" from | "all".
    """
    return Aggregation(lambda sequences: 1 / sequences.lengths_BT, _completions(count))


def token_mean() -> Aggregation:
    """Builds DAPO's mean: every token of the batch counts the same (arXiv 2503.14476, eq. 8).

    1/sum_i |o_i|  sum_i sum_t x[i, t]
    """
    return Aggregation(
        lambda sequences: 1.0,
        lambda sequences: jnp.sum(sequences.mask_BT, dtype=jnp.float32),
    )


def constant(*, divisor: float = 0.0, count: str = "learnt") -> Aggregation:
    """Builds Dr.GRPO's mean: every token counts the same, by a constant divisor.

        1/B sum_i 1/divisor sum_t x[i, t]

    Where GRPO divides by the length |o_i|, Dr.GRPO divides by a constant (arXiv 2503.20783,
    section 3.2). Other systems call it "seq-mean-token-sum-norm", and with a divisor of 1
    "seq-mean-token-sum".

    Args:
      divisor: tokens; 0 is the longest completion that can be sampled. Never the width of the
        batch, which would make padding matter.
      count: as of `sequence_mean`.
    """
    return Aggregation(lambda sequences: 1 / divisor, _completions(count))


def token_sum() -> Aggregation:
    """Builds the sum over all tokens, which grows with the batch.

    sum_i sum_t x[i, t]
    """
    return Aggregation(lambda sequences: 1.0, lambda sequences: jnp.ones((), jnp.float32))


def prompt_mean() -> Aggregation:
    """Builds ScaleRL's mean: every prompt counts the same (arXiv 2510.13786, section 3).

        1/P sum_p  1/sum_{i in p} |o_i|  sum_{i in p} sum_t x[i, t]

    Also DAPO's equation 8 as it is written, for one prompt. Where a minibatch has some of a
    prompt's completions, they count as the share of the prompt's tokens that they have.
    """

    def share(sequences: Sequences) -> Array:
        assert sequences.group_tokens_BT is not None
        return 1 / jnp.maximum(sequences.group_tokens_BT, 1.0)

    def weight(sequences: Sequences) -> Array:
        return jnp.sum(jnp.where(sequences.mask_BT, share(sequences), 0.0), dtype=jnp.float32)

    return Aggregation(share, weight, frozenset({"group_tokens"}))


def _completions(count: str) -> Callable[[Sequences], Array]:
    """Returns what counts the sequences of a batch."""
    if count == "all":
        return lambda sequences: jnp.sum(sequences.rows_B, dtype=jnp.float32)
    return lambda sequences: sequences.count()


AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "constant": constant,
    "token_sum": token_sum,
    "prompt_mean": prompt_mean,
}
