"""What is maximised in place of the return of the policy, token by token.

A surrogate is a function of `Tokens` and their ratio that returns a `Gain`. Each is built by a
function of its options. With A the advantage, r the ratio and sg the stop of a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from errors import UserError
from rl.algorithms.ratios import clamped
from rl.algorithms.tokens import Tokens, ignoring

BOUNDS = ("relative", "absolute")


class Gain(NamedTuple):
    """What each token adds to the objective, [B, T] each.

    gain_BT: float32, to be maximised.
    low_BT, high_BT: bool, whether its gradient is cut off or scaled down there because the ratio is
      too low or too high: for the clip fractions.
    """

    gain_BT: Array
    low_BT: Array
    high_BT: Array


Surrogate = Callable[[Tokens, Array], Gain]


def clipped(
    *, low: float = 0.2, high: float = 0.2, bounds: str = "relative", delta: float = 0.0
) -> Surrogate:
    """Builds the clipped surrogate (PPO, arXiv 1707.06347, eq. 7).

        min(r A, clip(r, 1 - low, 1 + high) A)

    With high > low it is clip-higher (DAPO, arXiv 2503.14476, eq. 10). A token that has moved past
    the bound in the direction of its advantage has no gradient. One that has moved the other way
    always has.

    Args:
      low, high: the bounds of the ratio.
      bounds: they are "relative" to 1, as above | "absolute": clip(r, low, high).
      delta: of any row, see rl/algorithms/options.py; here the clip is that of the whole ratio.
    """
    least, most = _bounds(low, high, bounds)

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        A_BT = tokens.advantages_BT
        bounded_BT = jnp.minimum(ratio_BT, delta) if delta else ratio_BT
        gain_BT = jnp.minimum(bounded_BT * A_BT, jnp.clip(ratio_BT, least, most) * A_BT)
        return Gain(gain_BT, (A_BT < 0) & (ratio_BT < least), (A_BT > 0) & (ratio_BT > most))

    surrogate.has_delta = True  # pyright: ignore[reportFunctionMemberAccess]
    return surrogate


def cispo(
    *, low: float = 0.0, high: float = 5.0, bounds: str = "absolute", outside: str = "clipped"
) -> Surrogate:
    """Builds CISPO's surrogate: the weight is clipped, no gradient is (arXiv 2506.13585).

        sg(clip(r, low, high)) A log pi

    The paper leaves the lower bound out and does not give the upper one. Libraries differ in what
    `high` means: TRL's is the bound (5.0 as in ScaleRL, arXiv 2510.13786), verl's and others' the
    distance from 1, which is `bounds = "relative"`.

    Args:
      outside: a ratio outside the bounds is "clipped" | weighs nothing: "dropped", as SkyRL's
        rollout_is.
    """
    least, most = _bounds(low, high, bounds)
    _require(outside in ("clipped", "dropped"), "outside must be one of clipped, dropped")

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        low_BT, high_BT = ratio_BT < least, ratio_BT > most
        weight_BT = jnp.clip(ratio_BT, least, most)
        if outside == "dropped":
            weight_BT = jnp.where(low_BT | high_BT, 0.0, weight_BT)
        weight_BT = jax.lax.stop_gradient(weight_BT)
        return Gain(weight_BT * tokens.advantages_BT * tokens.logprobs_BT, low_BT, high_BT)

    return surrogate


def unclipped(*, most: float = 0.0) -> Surrogate:
    """Builds r A, the importance-weighted return.

    Args:
      most: with a bound it is sg(min(r, most)) A log pi, whose weight is truncated while its
        gradient goes on; 0 is none. Unlike CISPO's, the bound may be below 1.
    """

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        if not most:
            return _never_cut(ratio_BT * tokens.advantages_BT)
        nowhere_BT = jnp.zeros(ratio_BT.shape, bool)
        return _truncated(tokens, ratio_BT, most, nowhere_BT, nowhere_BT, as_ratio=False)

    return surrogate


def log_likelihood() -> Surrogate:
    """Builds A log pi, whatever the ratio (REINFORCE; GPG, arXiv 2504.02546)."""

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        return _never_cut(tokens.advantages_BT * tokens.logprobs_BT)

    return ignoring(surrogate)


def soft_gate(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Surrogate:
    """Builds SAPO's surrogate, a smooth clip (arXiv 2511.20347).

        4 sigmoid(tau (r - 1)) / tau A

    The gradient is that of r A at r = 1 and fades on either side; tau is tau_positive where A > 0,
    else tau_negative.
    """
    _require(min(tau_positive, tau_negative) > 0, "tau_positive and tau_negative must be positive")

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        tau_BT = jnp.where(tokens.advantages_BT > 0, tau_positive, tau_negative)
        gate_BT = jax.nn.sigmoid(tau_BT * (ratio_BT - 1)) * 4 / tau_BT
        return _never_cut(gate_BT * tokens.advantages_BT)

    return surrogate


def total_variation(
    *,
    low: float = 0.2,
    high: float = 0.2,
    most: float = 20.0,
    sides: str = "outward",
    as_ratio: bool = False,
    log_square: float = 0.0,
) -> Surrogate:
    """Builds DPPO's surrogate with the total variation of a token (arXiv 2602.04879, section 4).

        sg(min(r, most) M) A log pi

    M is 0 where A > 0 and pi - pi_old > high, and where A <= 0 and pi - pi_old < -low, else 1.

    Args:
      low, high: differences of probability, so rare tokens may change by large ratios.
      most: bound of the ratio.
      sides: M is 0 where the policy has moved too far "outward", as above | on "both" sides,
        whatever A, as prime-rl's IPO.
      as_ratio: M min(r, most) A in its place, of the same gradient up to `most`, as in prime-rl and
        SkyRL.
      log_square: coefficient of (log r)^2, which is taken off; prime-rl has 0.001.
    """
    _require(sides in ("outward", "both"), "sides must be one of outward, both")

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        moved_BT = jnp.exp(tokens.logprobs_BT) - jnp.exp(tokens.old_BT)
        positive_BT = tokens.advantages_BT > 0
        high_BT, low_BT = moved_BT > high, moved_BT < -low
        if sides == "outward":
            high_BT, low_BT = positive_BT & high_BT, ~positive_BT & low_BT
        gain = _truncated(tokens, ratio_BT, most, low_BT, high_BT, as_ratio)
        if not log_square:
            return gain
        return gain._replace(gain_BT=gain.gain_BT - log_square * jnp.square(tokens.log_ratio_BT))

    return surrogate


def binary_divergence(
    *, low: float = 0.05, high: float = 0.05, most: float = 20.0, as_ratio: bool = False
) -> Surrogate:
    """Builds DPPO's surrogate with the KL of "this token or another" (arXiv 2602.04879, section 4).

        sg(min(r, most) M) A log pi
        D = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old) / (1 - pi))

    M is 0 where D is above high, A > 0 and pi > pi_old, and where D is above low, A <= 0 and
    pi < pi_old; else 1.

    Args:
      as_ratio: as of `total_variation`.
    """

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        pi_BT, old_BT = jnp.exp(tokens.logprobs_BT), jnp.exp(tokens.old_BT)
        eps = 1e-8  # of a probability of 1, as the paper's code has it
        others_BT = jnp.log((1 - old_BT + eps) / (1 - pi_BT + eps))
        D_BT = old_BT * (tokens.old_BT - tokens.logprobs_BT) + (1 - old_BT) * others_BT
        positive_BT = tokens.advantages_BT > 0
        high_BT = positive_BT & (high < D_BT) & (pi_BT > old_BT)
        low_BT = ~positive_BT & (low < D_BT) & (pi_BT < old_BT)
        return _truncated(tokens, ratio_BT, most, low_BT, high_BT, as_ratio)

    return surrogate


def gamma_weighted(
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Surrogate:
    """Builds VESPO's surrogate (arXiv 2602.10693): the completion's ratio, smoothly bounded.

        sg(phi(w)) A log pi,  phi(w) = e^lambda w^k e^(-lambda w),  w = prod_t r[t]

    phi(1) is 1; k and lambda are the positive ones where A >= 0. The correction for the sampler is
    part of w, a factor of each token's, or one of a completion, and does not multiply the surrogate
    once more.
    """

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        log_w_BT = tokens.sequences.sum(clamped(tokens.log_ratio_BT, 20.0))
        least = jnp.log(1e-8)
        if tokens.correction_BT is not None:
            log_w_BT += tokens.sequences.sum(jnp.maximum(jnp.log(tokens.correction_BT), least))
        log_w_BT = jnp.clip(log_w_BT, least, 20.0)
        positive_BT = tokens.advantages_BT >= 0
        k_BT = jnp.where(positive_BT, k_positive, k_negative)
        lambda_BT = jnp.where(positive_BT, lambda_positive, lambda_negative)
        phi_BT = jnp.exp(lambda_BT + k_BT * log_w_BT - lambda_BT * jnp.exp(log_w_BT))
        weight_BT = jax.lax.stop_gradient(phi_BT)
        return _never_cut(weight_BT * tokens.advantages_BT * tokens.logprobs_BT)

    surrogate.has_correction = True
    return surrogate


def geometric_mean(*, low: float = 0.4, high: float = 0.4) -> Surrogate:
    """Builds GMPO's surrogate (arXiv 2507.20673): a geometric mean of clipped ratios.

        A exp(1/|o| sum_t l[t])

    l is log r, at most high where A > 0 and at least -low where A < 0: bounds are in log space, on
    one side, and come before the mean. Every token has the value of its completion, with the mean
    of its advantages for A.
    """

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        log_BT, A_BT = tokens.log_ratio_BT, tokens.advantages_BT
        high_BT, low_BT = (A_BT > 0) & (log_BT > high), (A_BT < 0) & (log_BT < -low)
        bounded_BT = jnp.where(high_BT, high, jnp.where(low_BT, -low, log_BT))
        # Where the advantage is 0 nothing is learnt, and its sign clips nothing: l is 0.
        bounded_BT = jnp.where(A_BT == 0, 0.0, bounded_BT)
        of_sequence_BT = jnp.exp(tokens.sequences.mean(bounded_BT))
        return Gain(tokens.sequences.mean(A_BT) * of_sequence_BT, low_BT, high_BT)

    return surrogate


def mirror_descent(*, tau: float = 0.1, level: str = "sequence") -> Surrogate:
    """Builds the surrogate of online mirror descent (Kimi k1.5, arXiv 2501.12599).

        A log pi - tau/2 (log pi / pi_old)^2

    Args:
      tau: how close the policy stays to the one that sampled; not given in the paper.
      level: the square is of the log-ratio of the "sequence", whose tokens share it, as in the
        paper | of each "token" (DRO).
    """
    _require(tau > 0, "tau must be positive")
    _require(level in ("sequence", "token"), 'level must be "sequence" or "token"')

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        log_BT = tokens.log_ratio_BT
        squared_BT = jnp.square(log_BT)
        if level == "sequence":
            squared_BT = jnp.square(tokens.sequences.sum(log_BT)) / tokens.sequences.lengths_BT
        return _never_cut(tokens.advantages_BT * tokens.logprobs_BT - tau / 2 * squared_BT)

    return surrogate


def covariance_penalty(*, coefficient: float = 1.0) -> Surrogate:
    """Builds KL-Cov's surrogate: a penalty on tokens that a selection singled out.

        r A - coefficient |log r| on chosen tokens, r A elsewhere

    (arXiv 2505.22617.)
    """

    def surrogate(tokens: Tokens, ratio_BT: Array) -> Gain:
        assert tokens.chosen_BT is not None
        penalty_BT = jnp.where(tokens.chosen_BT, coefficient * jnp.abs(tokens.log_ratio_BT), 0.0)
        return _never_cut(ratio_BT * tokens.advantages_BT - penalty_BT)

    return surrogate


def _bounds(low: float, high: float, bounds: str) -> tuple[float, float]:
    """Returns the least and the largest ratio that is not cut."""
    _require(bounds in BOUNDS, f"bounds must be one of {', '.join(BOUNDS)}")
    least, most = (1 - low, 1 + high) if bounds == "relative" else (low, high)
    _require(least <= 1 <= most, "the bounds of the ratio must have 1 between them")
    return least, most


def _truncated(
    tokens: Tokens, ratio_BT: Array, most: float, low_BT: Array, high_BT: Array, as_ratio: bool
) -> Gain:
    """Returns sg(min(r, most)) A log pi, or min(r, most) A; 0 where the gradient is cut off."""
    weight_BT = jnp.where(low_BT | high_BT, 0.0, jnp.minimum(ratio_BT, most))
    if as_ratio:
        return Gain(weight_BT * tokens.advantages_BT, low_BT, high_BT)
    weight_BT = jax.lax.stop_gradient(weight_BT)
    return Gain(weight_BT * tokens.advantages_BT * tokens.logprobs_BT, low_BT, high_BT)


def _never_cut(gain_BT: Array) -> Gain:
    nowhere_BT = jnp.zeros(gain_BT.shape, bool)
    return Gain(gain_BT, nowhere_BT, nowhere_BT)


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise UserError(what)


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "clipped": clipped,
    "cispo": cispo,
    "unclipped": unclipped,
    "log_likelihood": log_likelihood,
    "soft_gate": soft_gate,
    "total_variation": total_variation,
    "binary_divergence": binary_divergence,
    "gamma_weighted": gamma_weighted,
    "geometric_mean": geometric_mean,
    "mirror_descent": mirror_descent,
    "covariance_penalty": covariance_penalty,
}
