"""Drawing one token a row, and the record of what it was drawn from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rl.config import SamplingConfig


class Drawn(NamedTuple):
    """One token a row, how likely it was, and what it was drawn from.

    token_B: int32, the ids.
    logprob_B: float32, the log-probability of each at the sampling temperature, over the whole
      vocabulary.
    log_kept_B: float32, the logarithm of the share of probability that was drawn from: 0 where
      nothing was left out. The log-probability of the draw itself is `logprob_B - log_kept_B`.
    kept_BV: bool, the ids that each was drawn from.
    """

    token_B: Array
    logprob_B: Array
    log_kept_B: Array
    kept_BV: Array


def keep_likely(logprobs_BV: Array, top_k: int, top_p: float) -> Array:
    """Returns the mask [B, V] of top-k and nucleus sampling (arXiv 1904.09751).

    Kept are, of the top_k likeliest tokens (0: of all that are possible), the fewest whose
    probabilities add up to top_p of theirs. Ties are kept.
    """
    keep_BV = logprobs_BV > -jnp.inf
    if 0 < top_k < logprobs_BV.shape[-1]:
        keep_BV &= logprobs_BV >= jax.lax.top_k(logprobs_BV, top_k)[0][:, -1:]
    if top_p < 1:
        probs_BV = jnp.where(keep_BV, jnp.exp(logprobs_BV), 0.0)
        probs_BV /= jnp.sum(probs_BV, axis=-1, keepdims=True)
        descending_BV = -jnp.sort(-probs_BV, axis=-1)
        before_BV = jnp.cumsum(descending_BV, axis=-1) - descending_BV
        least_B1 = jnp.min(
            jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True
        )
        keep_BV &= probs_BV >= least_B1
    return keep_BV


class Distribution(NamedTuple):
    """What a token is drawn from.

    logprobs_BV: float32, log-probabilities at the sampling temperature, over the whole vocabulary.
    kept_BV: the same where a token may be drawn, else -inf.
    log_kept_B: as of `Drawn`.
    """

    logprobs_BV: Array
    kept_BV: Array
    log_kept_B: Array

    @property
    def normalised_BV(self) -> Array:
        """The log-probabilities of the draw itself."""
        return self.kept_BV - self.log_kept_B[:, None]

    def drawn(self, token_B: Array) -> Drawn:
        """Returns the record of tokens that were drawn from it."""
        logprob_B = jnp.take_along_axis(self.logprobs_BV, token_B[:, None], axis=-1)[:, 0]
        kept_BV = self.kept_BV > -jnp.inf
        return Drawn(token_B.astype(jnp.int32), logprob_B, self.log_kept_B, kept_BV)


def draw(
    sampling: SamplingConfig,
    logits_BV: Array,
    key_B: Array,
    forbidden_BK: Array | None = None,
    allowed_BV: Array | None = None,
    rejected_BV: Array | None = None,
) -> Drawn:
    """Draws one token a row, each with its own key.

    Temperature 0 takes the likeliest token that may be, and reports its log-probability at
    temperature 1.

    Args:
      key_B: random keys.
      logits_BV, forbidden_BK, allowed_BV: see `distribution`.
      rejected_BV: see `without_rejected`.
    """
    choice = distribution(sampling, logits_BV, forbidden_BK, allowed_BV)
    if sampling.temperature == 0:
        return choice.drawn(likeliest(choice, logits_BV))
    kept_BV = choice.kept_BV
    if rejected_BV is not None:
        kept_BV = without_rejected(choice.normalised_BV, rejected_BV)
    return choice.drawn(jax.vmap(jax.random.categorical)(key_B, kept_BV))


def likeliest(choice: Distribution, logits_BV: Array) -> Array:
    """Returns the likeliest token that may be drawn, by the logits: they have no rounding."""
    return jnp.argmax(jnp.where(choice.kept_BV > -jnp.inf, logits_BV, -jnp.inf), axis=-1)


def without_rejected(logprobs_BV: Array, rejected_BV: Array) -> Array:
    """Returns what is left of a distribution p when a draft from q was rejected: max(p - q, 0).

    A draft is taken with probability min(1, p / q), so that with what is drawn from here in place
    of those rejected every token has the probability p (arXiv 2211.17192, appendix A.1).

    Args:
      logprobs_BV: log p.
      rejected_BV: log q; -inf where no draft was rejected, which leaves p.
    """
    left_BV = jnp.maximum(jnp.exp(logprobs_BV) - jnp.exp(rejected_BV), 0.0)
    # Where p and q differ by rounding alone nothing may be left.
    some_B1 = jnp.any(left_BV > 0, axis=-1, keepdims=True)
    return jnp.where(some_B1, jnp.log(left_BV), logprobs_BV)


def distribution(
    sampling: SamplingConfig,
    logits_BV: Array,
    forbidden_BK: Array | None = None,
    allowed_BV: Array | None = None,
) -> Distribution:
    """Returns what the next token of each row is drawn from.

    Args:
      logits_BV: float32.
      forbidden_BK: int32, distinct ids that may not be drawn, then -1.
      allowed_BV: bool, the ids that may be drawn; at least one a row.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV / (sampling.temperature or 1.0), axis=-1)
    kept_BV, log_kept_B = logprobs_BV, jnp.zeros(logits_BV.shape[0], jnp.float32)
    if forbidden_BK is not None:
        # By the few that are left out: a row without them has 0, to the bit, in any company.
        out_BK = jnp.where(forbidden_BK < 0, logits_BV.shape[-1], forbidden_BK)
        share_BK = jnp.take_along_axis(
            jnp.exp(logprobs_BV), out_BK, axis=-1, mode="fill", fill_value=0.0
        )
        log_kept_B = jnp.log1p(-jnp.sum(share_BK, axis=-1))
        row_B1 = jnp.arange(out_BK.shape[0])[:, None]
        kept_BV = kept_BV.at[row_B1, out_BK].set(-jnp.inf, mode="drop")
    if allowed_BV is not None:
        kept_BV = jnp.where(allowed_BV, kept_BV, -jnp.inf)
    if sampling.restricts:
        keep_BV = keep_likely(kept_BV, sampling.top_k, sampling.top_p)
        kept_BV = jnp.where(keep_BV, kept_BV, -jnp.inf)
        log_kept_B = jax.nn.logsumexp(kept_BV, axis=-1)
    elif allowed_BV is not None:
        restricted_B = ~jnp.all(allowed_BV, axis=-1)
        log_kept_B = jnp.where(restricted_B, jax.nn.logsumexp(kept_BV, axis=-1), log_kept_B)
    return Distribution(logprobs_BV, kept_BV, log_kept_B)
