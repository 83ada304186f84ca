"""Tokens that are singled out among all that an update learns from.

What a selection chooses depends on the other tokens of the update, and on the policy as it is now.
So it is made before the update, of a forward pass over all of its tokens: made in a microbatch, it
would change with the microbatches.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from errors import UserError
from rl.algorithms.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens are chosen, and what becomes of them.

    choose: (tokens, cut_BT, lots_BT) -> chosen_BT, bool. cut_BT says where the surrogate cuts the
      gradient off; lots_BT has a number from [0, 1) for each token, the same however the batch is
      laid out.
    effect: "read": the surrogate knows what to do | "zero": they add nothing to the surrogate |
      "removed": nor do they count in its mean.
    needs: as `rl.algorithms.tokens.needing` notes it.
    """

    choose: Callable[[Tokens, Array, Array], Array]
    effect: str
    needs: frozenset[str] = frozenset({"current"})


def clip_cov(*, cov_share: float = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0) -> Selection:
    """Builds Clip-Cov (arXiv 2505.22617): some tokens have no gradient.

    Of the tokens whose covariance is between cov_low and cov_high, and which the surrogate does not
    cut, a share cov_share of all tokens is drawn by lot, one at least.

    Args:
      cov_share: of the tokens of the update.
    """

    def choose(tokens: Tokens, cut_BT: Array, lots_BT: Array) -> Array:
        cov_BT = covariance(tokens)
        open_BT = tokens.mask_BT & ~cut_BT & (cov_BT > cov_low) & (cov_BT < cov_high)
        return _first(jnp.where(open_BT, lots_BT, jnp.inf), _some(tokens, cov_share))

    return Selection(choose, "zero")


def kl_cov(*, cov_share: float = 2e-4) -> Selection:
    """Builds KL-Cov (arXiv 2505.22617): the tokens of the largest covariance.

    What they pay is the surrogate `covariance_penalty`'s. Tokens that tie with the last one are
    chosen too.

    Args:
      cov_share: of the tokens of the update; one at least is chosen.
    """

    def choose(tokens: Tokens, cut_BT: Array, lots_BT: Array) -> Array:
        cov_BT = jnp.where(tokens.mask_BT, covariance(tokens), -jnp.inf)
        return _first(-cov_BT, _some(tokens, cov_share))

    return Selection(choose, "read")


def second_moment(*, moment: float = 0.04) -> Selection:
    """Builds M2PO (arXiv 2510.01161): what the sampler drew too differently is removed.

    The tokens whose log-ratio to the sampler is largest are removed, one after the other, until the
    mean of its square over the others is below `moment`.
    """

    def choose(tokens: Tokens, cut_BT: Array, lots_BT: Array) -> Array:
        square_BT = jnp.square(tokens.logprobs_BT - tokens.sampler_BT)
        square_BT = jnp.where(tokens.mask_BT, square_BT, jnp.inf)
        ascending_N = jnp.sort(square_BT.ravel())
        inside_N = jnp.isfinite(ascending_N)
        sums_N = jnp.cumsum(jnp.where(inside_N, ascending_N, 0.0))
        means_N = sums_N / jnp.arange(1, len(sums_N) + 1)
        # Means rise with the number kept. One stays, whatever it is.
        kept = jnp.maximum(jnp.sum(inside_N & (means_N < moment)), 1)
        return tokens.mask_BT & (square_BT > ascending_N[kept - 1])

    return Selection(choose, "removed")


def low_entropy(*, entropy_share: float = 0.2) -> Selection:
    """Builds the rule of the high-entropy minority (arXiv 2506.01939): only forks are learnt from.

    Tokens below the quantile 1 - entropy_share of the entropies of the update add nothing.

    Args:
      entropy_share: of tokens that are learnt from.
    """
    if not 0 < entropy_share <= 1:
        raise UserError("entropy_share must be in (0, 1]")

    def choose(tokens: Tokens, cut_BT: Array, lots_BT: Array) -> Array:
        entropy_BT = jnp.where(tokens.mask_BT, tokens.entropy_BT, jnp.nan)
        return tokens.mask_BT & (entropy_BT < jnp.nanquantile(entropy_BT, 1 - entropy_share))

    return Selection(choose, "zero")


def covariance(tokens: Tokens) -> Array:
    """Returns each token's part in the covariance of advantage and log-prob (arXiv 2505.22617).

    (A - mean A) (log pi - mean log pi), with means over the tokens of the update
    """

    def centred(values_BT: Array) -> Array:
        count = jnp.maximum(jnp.sum(tokens.mask_BT), 1)
        return values_BT - jnp.sum(jnp.where(tokens.mask_BT, values_BT, 0.0)) / count

    return centred(tokens.advantages_BT) * centred(tokens.logprobs_BT)


def _some(tokens: Tokens, share: float) -> Array:
    """Returns how many tokens a share is, one at least."""
    # A rounding below a whole number is not a token less.
    return jnp.maximum(jnp.floor(share * jnp.sum(tokens.mask_BT) + 1e-4), 1).astype(jnp.int32)


def _first(keys_BT: Array, count: Array) -> Array:
    """Returns where the `count` smallest finite keys are, with all that tie with the last."""
    last = jnp.sort(keys_BT.ravel())[count - 1]
    return jnp.isfinite(keys_BT) & (keys_BT <= last)


SELECTIONS: dict[str, Callable[..., Selection]] = {
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "second_moment": second_moment,
    "low_entropy": low_entropy,
}
