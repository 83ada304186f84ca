"""How much a token counts since the sampler is not quite the trainer, and what is left out for it.

Both compare the old policy as the trainer computes it with the sampler's record: with l = log
pi_old - log pi_sampler, which is 0 where `reinforce.old_logprobs` is "sampler". They depend on what
was sampled alone, are computed once a step over all of its tokens, and have no gradient.
"""

import jax.numpy as jnp
from jax import Array

from rl.algorithms.ratios import clamped
from rl.algorithms.sequences import Sequences

CORRECTIONS = (
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
)
REJECTIONS = (
    "token_k1",
    "token_k2",
    "token_k3",
    "sequence_sum_k1",
    "sequence_sum_k2",
    "sequence_sum_k3",
    "sequence_mean_k1",
    "sequence_mean_k2",
    "sequence_mean_k3",
    "sequence_max_k1",
    "sequence_max_k2",
    "sequence_max_k3",
    "sequence_all_k1",
)


def correction(
    kind: str, log_BT: Array, sequences: Sequences, low: float, high: float, mean_one: bool
) -> Array:
    """Returns importance weights pi_old / pi_sampler, float32 [B, T].

    * token_truncate: min(w, high), TIS (fengyao.notion.site/off-policy-rl).
    * token_mask: w within [low, high], else 0: MIS, and with a lower bound IcePop (arXiv
      2510.18855).
    * sequence_truncate, sequence_mask: the same of the product over the completion.
    * geometric_truncate, geometric_mask: of the geometric mean (AReaL and slime).

    Args:
      log_BT: l, 0 where nothing is learnt from.
      low: the least weight: below it is raised to it, or masked.
      mean_one: divides by the mean over the step's tokens, or completions.
    """
    level, _, form = kind.partition("_")
    if level != "token":
        log_BT = (sequences.sum if level == "sequence" else sequences.mean)(log_BT)
    weight_BT = jnp.exp(clamped(log_BT, 20.0))
    if form == "truncate":
        weight_BT = jnp.clip(weight_BT, low, high)
    else:
        weight_BT = jnp.where((weight_BT >= low) & (weight_BT <= high), weight_BT, 0.0)
    if not mean_one:
        return weight_BT
    share_BT = 1 / sequences.lengths_BT if level != "token" else jnp.ones(weight_BT.shape)
    share_BT = jnp.where(sequences.mask_BT, share_BT, 0.0)
    mean = jnp.sum(weight_BT * share_BT) / jnp.maximum(jnp.sum(share_BT), 1e-8)
    return jnp.where(mean > 1e-8, weight_BT / mean, weight_BT)


def within(kind: str, log_BT: Array, sequences: Sequences, low: float, high: float) -> Array:
    """Returns which tokens a rejection keeps, bool [B, T].

    The estimate is l for k1, l^2 / 2 for k2 and exp(l) - 1 - l for k3, of the token, or its sum,
    mean or maximum over the completion. k1 keeps log low <= l <= log high: bounds are of the
    ratio, and of the mean of k1 those of its geometric mean. The others keep what is at most high.
    sequence_all_k1 keeps completions of which every token is within the bounds.
    verl's k1 is of the sampler over the trainer: its bounds are ours upside down.
    """
    over, _, estimate = kind.rpartition("_")
    log_BT = clamped(log_BT, 20.0)
    found_BT = {
        "k1": log_BT,
        "k2": jnp.square(log_BT) / 2,
        "k3": jnp.expm1(log_BT) - log_BT,
    }[estimate]
    if over == "sequence_all":
        outside_BT = (found_BT < jnp.log(low)) | (found_BT > jnp.log(high))
        return sequences.largest(outside_BT) == 0
    if over != "token":
        reduce = {"sum": sequences.sum, "mean": sequences.mean, "max": sequences.largest}
        found_BT = reduce[over.removeprefix("sequence_")](found_BT)
    if estimate == "k1":
        return (found_BT >= jnp.log(low)) & (found_BT <= jnp.log(high))
    return found_BT <= high
