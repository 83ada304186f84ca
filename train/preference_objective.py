"""A loss over pairs (train/preferences.py) as an objective of the ordinary train step.

    loss = coefficient * sum over pairs of their loss / pairs  +  nll * likelihood of the chosen

Both answers of a pair stand in one row, in two neighbouring segments (data/packing.py), so a sum
over pairs is a sum over rows, and does not depend on how these are cut. The batch is one of pairs,
with "reference_logprobs" [B, T] where the loss needs them: the reference's log-prob of each target,
at the target itself. MTP modules do not run, and learn nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import compiler_options
from model.config import ModelConfig
from model.segments import same_segment
from model.sharding import batch_sharding
from train.config import TrainConfig
from train.objective import (
    Batch,
    Objective,
    Term,
    Totals,
    layer_terms,
    layer_totals,
    target_weights,
)
from train.preferences import Answers, Preference
from train.scoring import forward_logprobs, in_parts, logprobs_at_tokens, predicted
from train.setup import Setup

REFERENCE = "reference_logprobs"

# The least tokens of a pair: one to begin with and one target, of either answer.
LEAST_TOKENS = 4

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Pairs(NamedTuple):
    """The pairs of a batch, by row and number in it.

    chosen, rejected: [B, P] each; of a place without a pair the values are harmless.
    there_BP: whether there is a pair.
    """

    chosen: Answers
    rejected: Answers
    there_BP: Array


def preference_objective(
    config: ModelConfig, train: TrainConfig, preference: Preference
) -> Objective:
    """Builds the objective of a loss over pairs.

    Its terms are the layers' (balance, the indexer's KL), "preference_loss", "nll_loss" where the
    loss has it, and as metrics, means over pairs, `METRICS` and those of the row.
    """

    def totals(variables: dict, batch: Batch) -> Totals:
        """Computes the totals of a microbatch: pairs, likelihood, metrics and layers."""
        logprobs_BT, _, output = forward_logprobs(config, train.stage, 1.0, variables, batch)
        terms = preference_totals(preference, logprobs_BT, batch)
        terms |= layer_totals(config, train.stage, output.stats)
        return Totals(terms, output.stats.router.counts_E, maxima={}, minima={})

    def likelihood_weight(batch: Batch) -> Array:
        if preference.nll_mean == "token":
            return jnp.sum(likelihood_mask(preference, batch), dtype=jnp.float32)
        return pair_count(batch)

    terms = [
        *layer_terms(config, train, mtp_depth=0),
        Term("preference_loss", pair_count, preference.coefficient),
    ]
    if preference.nll:
        terms.append(Term("nll_loss", likelihood_weight, preference.nll))
    terms += [Term(name, pair_count) for name in (*METRICS, *preference.metrics)]
    reads = (REFERENCE,) if preference.needs_reference else ()
    return Objective(tuple(terms), totals, reads=reads)


def preference_totals(preference: Preference, logprobs_BT: Array, batch: Batch) -> dict[str, Array]:
    """Sums the loss and its metrics over the pairs of a microbatch.

    Args:
      logprobs_BT: of the policy, of the next token at each position.
    """
    reference_BT = None
    if preference.needs_reference:
        reference_BT = predicted(batch, REFERENCE)
    pairs = pairs_of(batch, logprobs_BT, reference_BT)

    def total(values_BP: Array) -> Array:
        return jnp.sum(jnp.where(pairs.there_BP, values_BP, 0.0))

    with jax.named_scope("preference"):
        found = preference.compare(pairs.chosen, pairs.rejected)
        chosen_BP, rejected_BP = found.rewards
        totals = {
            "preference_loss": total(found.loss),
            "rewards/chosen": total(chosen_BP),
            "rewards/rejected": total(rejected_BP),
            "rewards/accuracies": total(jnp.float32(chosen_BP > rejected_BP)),
            "rewards/margins": total(chosen_BP - rejected_BP),
            "logps/chosen": total(found.logps[0]),
            "logps/rejected": total(found.logps[1]),
        }
        totals |= {name: total(values_BP) for name, values_BP in found.metrics.items()}
        if preference.nll:
            totals["nll_loss"] = -_likelihood(preference, logprobs_BT, batch)
    return totals


def pairs_of(batch: Batch, logprobs_BT: Array, reference_BT: Array | None) -> Pairs:
    """Sums log-probs over each answer of each pair.

    Args:
      logprobs_BT, reference_BT: of the next token at each position, by the policy and by the
        reference; None sums zeros.
    """
    weights_BT = target_weights(batch, 1)
    if reference_BT is None:
        reference_BT = jnp.zeros_like(logprobs_BT)

    def answers(mask_BT: Array) -> Answers:
        sums = (_sum_by_pair(batch, mask_BT, x) for x in (logprobs_BT, reference_BT))
        logprobs_BP, reference_BP = (jnp.where(there_BP, sum_BP, -1.0) for sum_BP in sums)
        lengths_BP = jnp.maximum(_sum_by_pair(batch, mask_BT), 1.0)
        return Answers(logprobs_BP, lengths_BP, reference_BP)

    there_BP = _pairs_there(batch)
    return Pairs(answers(weights_BT > 0), answers(weights_BT < 0), there_BP)


def pair_count(batch: Batch) -> Array:
    """Returns how many pairs a batch has, a float32 scalar."""
    return jnp.sum(_pairs_there(batch), dtype=jnp.float32)


def likelihood_mask(preference: Preference, batch: Batch) -> Array:
    """Returns which next tokens the likelihood of the chosen is of, bool [B, T]."""
    if preference.nll_of == "answer":
        return target_weights(batch, 1) > 0
    return same_segment(batch["segments"], 1) & (batch["segments"] % 2 == 1)


def scored_by_reference(
    setup: Setup, train: TrainConfig, reference: dict | None
) -> Callable[[Batch], Batch]:
    """Returns a function that adds "reference_logprobs" to a batch, in microbatches.

    Without a reference it returns a batch as it is.
    """
    if reference is None:
        return lambda batch: batch

    def score(variables: dict, batch: Batch) -> Array:
        targets = batch | {"mask": batch["weights"] != 0}
        return logprobs_at_tokens(setup.model, train.stage, 1.0, variables, targets)

    score_fn = jax.jit(
        in_parts(score, train.microbatches),
        out_shardings=batch_sharding(setup.mesh),
        compiler_options=compiler_options(setup.mesh),
    )
    return lambda batch: batch | {REFERENCE: score_fn(reference, batch)}


def _likelihood(preference: Preference, logprobs_BT: Array, batch: Batch) -> Array:
    """Sums the log-probs of what is chosen, over tokens, or over pairs the mean over their own."""
    mask_BT = likelihood_mask(preference, batch)
    if preference.nll_mean == "token":
        return jnp.sum(jnp.where(mask_BT, logprobs_BT, 0.0))
    lengths_BP = jnp.maximum(_sum_by_pair(batch, mask_BT), 1.0)
    means_BP = _sum_by_pair(batch, mask_BT, logprobs_BT) / lengths_BP
    return jnp.sum(jnp.where(_pairs_there(batch), means_BP, 0.0))


def _pairs_there(batch: Batch) -> Array:
    """Returns the places in which there is a pair, both of whose answers have a target, [B, P]."""
    weights_BT = target_weights(batch, 1)
    chosen_BP, rejected_BP = (
        _sum_by_pair(batch, mask_BT) for mask_BT in (weights_BT > 0, weights_BT < 0)
    )
    return (chosen_BP > 0) & (rejected_BP > 0)


def _sum_by_pair(batch: Batch, mask_BT: Array, values_BT: Array | float = 1.0) -> Array:
    """Sums values where the mask is set over each pair of a row, float32 [B, P].

    P is as many pairs as a row has room for.
    """
    rows, width = mask_BT.shape
    # Segments 1 and 2 are the pair of number 1; number 0 is padding.
    numbers_BT = (batch["segments"] + 1) // 2
    nothing_BP = jnp.zeros((rows, width // LEAST_TOKENS + 1), jnp.float32)
    sums_BP = nothing_BP.at[jnp.arange(rows)[:, None], numbers_BT].add(
        jnp.where(mask_BT, values_BT, 0.0)
    )
    return sums_BP[:, 1:]
