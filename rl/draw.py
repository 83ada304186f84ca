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


def draw(
    sampling: SamplingConfig,
    logits_BV: Array,
    key_B: Array,
    forbidden_BK: Array | None = None,
    allowed_BV: Array | None = None,
) -> Drawn:
    """Draws one token a row, each with its own key.

    Temperature 0 takes the likeliest token that may be, and reports its log-probability at
    temperature 1.

    Args:
      logits_BV: float32.
      key_B: random keys.
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
    if sampling.temperature == 0:
        token_B = jnp.argmax(jnp.where(kept_BV > -jnp.inf, logits_BV, -jnp.inf), axis=-1)
    else:
        token_B = jax.vmap(jax.random.categorical)(key_B, kept_BV)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    return Drawn(token_B.astype(jnp.int32), logprob_B, log_kept_B, kept_BV > -jnp.inf)
