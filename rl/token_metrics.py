"""What an update measures of the tokens that it learns from, under the names of metrics.jsonl.

The names are TRL's where it has the quantity, else verl's (docs/metrics.md). An update reports
means and extremes over its tokens; `rl.measure.over_updates` makes those of a step of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from rl.algorithms.row import Algorithm
from rl.algorithms.surrogates import Gain
from rl.algorithms.tokens import Tokens


class Measured(NamedTuple):
    """What the metrics of a token are made of: the token, its ratio and its gain, [B, T] each."""

    tokens: Tokens
    ratio_BT: Array
    gain: Gain


def k3(log_ratio_BT: Array) -> Array:
    """Estimates KL(p | q) where p was drawn from, of log q - log p: exp(d) - 1 - d, [B, T]."""
    return jnp.exp(log_ratio_BT) - 1 - log_ratio_BT


def kl_to_reference(measured: Measured) -> Array:
    """Estimates KL(policy | reference) by k3, [B, T], whatever the loss takes for it."""
    tokens = measured.tokens
    assert tokens.reference_BT is not None
    return k3(tokens.reference_BT - tokens.logprobs_BT)


def log_mismatch(tokens: Tokens) -> Array:
    """Returns log policy - log sampler, [B, T]: before an update, what two programs differ by.

    Of tokens that older weights sampled, it is also what was learnt since.
    """
    return tokens.logprobs_BT - tokens.sampler_BT


LOGP_DIFFERENCE = "sampling/sampling_logp_difference"
IMPORTANCE = "sampling/importance_sampling_ratio"
SQUARES = {
    "ratio/mean": "ratio/effective_sample_size",
    f"{IMPORTANCE}/mean": "rollout_corr/rollout_is_eff_sample_size",
}
"""The mean of weights r -> their effective sample size, (mean r)^2 / mean r^2: a share of tokens.

An update reports mean r^2 under the latter name, so that means over updates can be taken first.
"""
TOKEN_METRICS: dict[str, Callable[[Measured], Array]] = {
    "entropy": lambda measured: measured.tokens.entropy_BT,
    "clip_ratio/region_mean": lambda measured: measured.gain.low_BT | measured.gain.high_BT,
    "clip_ratio/low_mean": lambda measured: measured.gain.low_BT,
    "clip_ratio/high_mean": lambda measured: measured.gain.high_BT,
    "ratio/mean": lambda measured: measured.ratio_BT,
    SQUARES["ratio/mean"]: lambda measured: jnp.square(measured.ratio_BT),
    "ppo_kl": lambda measured: k3(measured.tokens.log_ratio_BT),
    f"{IMPORTANCE}/mean": lambda measured: jnp.exp(log_mismatch(measured.tokens)),
    SQUARES[f"{IMPORTANCE}/mean"]: lambda measured: jnp.exp(2 * log_mismatch(measured.tokens)),
    "rollout_corr/kl": lambda measured: -log_mismatch(measured.tokens),
    "rollout_corr/k3_kl": lambda measured: k3(log_mismatch(measured.tokens)),
}
"""Metrics that are means over sampled tokens, by the name they are reported under."""
EXTREMES: dict[str, Callable[[Measured], Array]] = {
    "ratio": lambda measured: measured.ratio_BT,
    IMPORTANCE: lambda measured: jnp.exp(log_mismatch(measured.tokens)),
}
"""Of these the least and the largest over sampled tokens are reported, as NAME/min and NAME/max."""
FRESH_SHARE = "fresh_share"
"""The share of tokens whose sampler had the weights that the step began with.

Over those alone goes the difference of log-probs, so that it is what two programs differ by.
"""


def mean_names(algorithm: Algorithm) -> tuple[str, ...]:
    """Returns the names of what is a mean over all tokens that are learnt from."""
    kl = ("kl",) if "reference" in algorithm.needs else ()
    return (*TOKEN_METRICS, *kl, FRESH_SHARE)


def token_totals(
    measured: Measured, fresh_BT: Array, names: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Returns sums, maxima and minima over the tokens of a microbatch, float32 scalars.

    The sums are those of `names`, and that of the difference of log-probs.

    Args:
      fresh_BT: bool, the tokens over which that difference goes.
      names: of `mean_names`.
    """
    mask_BT = measured.tokens.mask_BT
    metrics = TOKEN_METRICS | {"kl": kl_to_reference, FRESH_SHARE: lambda _: fresh_BT}
    sums = {name: jnp.sum(jnp.where(mask_BT, metrics[name](measured), 0.0)) for name in names}
    gap_BT = jnp.where(fresh_BT, jnp.abs(log_mismatch(measured.tokens)), 0.0)
    sums[f"{LOGP_DIFFERENCE}/mean"] = jnp.sum(gap_BT)
    maxima, minima = {f"{LOGP_DIFFERENCE}/max": jnp.max(gap_BT)}, {}
    for name, metric in EXTREMES.items():
        x_BT = metric(measured)
        maxima[f"{name}/max"] = jnp.max(jnp.where(mask_BT, x_BT, -jnp.inf))
        minima[f"{name}/min"] = jnp.min(jnp.where(mask_BT, x_BT, jnp.inf))
    return sums, maxima, minima
