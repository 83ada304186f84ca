"""The loss of any row of the algorithm table, as an objective of the ordinary train step.

    loss = - aggregate(surrogate(ratio, advantage)) + coefficient * aggregate(divergence)

The batch is that of rl/trajectory.py with advantages, old_logprobs and, if there is a
divergence, reference_logprobs [B, T] added. Each stands at the token itself. It may have on_policy
too, bool [B]: rows whose old policy is the policy itself, see `old_of`; and stale, bool [B, T]:
tokens that weights of an earlier step sampled.
"""

from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.heads import token_logprobs
from model.record import replay
from model.segments import shift_left
from model.transformer import Output, Transformer
from rl.algorithms import Algorithm
from train.config import TrainConfig
from train.objective import Batch, Objective, Term, Totals, layer_terms, layer_totals


@flax.struct.dataclass
class PredictedTokens:
    """Holds what is known of the next token at each position, [B, T] each.

    mask_BT: bool, whether the token is a sampled one; the rest is meaningful only there.
    logprobs_BT, entropy_BT: of the policy, with a live gradient; log-probs are 0 outside the mask.
    old_logprobs_BT: of the policy that the ratio is taken to.
    sampler_logprobs_BT: as the sampler recorded them.
    ratio_BT: of the policy to the old one, live.
    clipped_BT: bool, whether the surrogate cut the gradient off.
    """

    mask_BT: Array
    logprobs_BT: Array
    entropy_BT: Array
    old_logprobs_BT: Array
    sampler_logprobs_BT: Array
    ratio_BT: Array
    clipped_BT: Array


def kl_to_old(tokens: PredictedTokens) -> Array:
    """Estimates KL(old | policy) by exp(d) - 1 - d, d = log policy - log old (k3), [B, T]."""
    log_ratio_BT = tokens.logprobs_BT - tokens.old_logprobs_BT
    return jnp.exp(log_ratio_BT) - 1 - log_ratio_BT


def logprob_gap(tokens: PredictedTokens) -> Array:
    """Returns |log policy - log sampler|, [B, T]: before an update, what two programs differ by."""
    return jnp.abs(tokens.logprobs_BT - tokens.sampler_logprobs_BT)


TOKEN_METRICS: dict[str, Callable[[PredictedTokens], Array]] = {
    "entropy": lambda tokens: tokens.entropy_BT,
    "clip_fraction": lambda tokens: tokens.clipped_BT,
    "ratio": lambda tokens: tokens.ratio_BT,
    "kl_to_old": kl_to_old,
}
"""Metrics that are means over sampled tokens, by the name they are reported under."""
MEAN_GAP, LARGEST_GAP = "sampler/logprob_gap_mean", "sampler/logprob_gap_max"
"""Those of the difference from the sampler's log-probs, where it sampled with the same weights."""


def policy_objective(
    config: ModelConfig, train: TrainConfig, algorithm: Algorithm, temperature: float
) -> Objective:
    """Builds the objective of a row of the table.

    Its terms are the layers' (balance, the indexer's KL), the policy's, the divergence if the row
    has one, and `TOKEN_METRICS`.

    Args:
      temperature: of sampling, so that the policy is what was sampled from.
    """
    aggregate, divergence = algorithm.aggregate, algorithm.divergence

    def aggregate_weight(batch: Batch) -> Array:
        return aggregate.weight(predicted_sequences(batch))

    def token_count(batch: Batch) -> Array:
        return jnp.sum(predicted(batch, "mask"), dtype=jnp.float32)

    def totals(variables: dict, batch: Batch) -> Totals:
        """Computes the totals of a microbatch: the policy, the divergence, metrics and layers."""
        logprobs_BT, entropy_BT, output = forward_logprobs(
            config, train.stage, temperature, variables, batch
        )
        mask_BT, sequences_BT = predicted(batch, "mask"), predicted_sequences(batch)
        logprobs_BT = jnp.where(mask_BT, logprobs_BT, 0.0)
        old_logprobs_BT = old_of(batch, logprobs_BT)
        ratio_BT = algorithm.ratio(logprobs_BT, old_logprobs_BT, mask_BT)
        surrogate_BT, clipped_BT = algorithm.surrogate(ratio_BT, predicted(batch, "advantages"))
        terms = {"policy": -aggregate.total(surrogate_BT, sequences_BT)}
        if divergence is not None:
            reference_BT = predicted(batch, "reference_logprobs")
            divergence_BT = divergence.estimator(logprobs_BT, reference_BT, ratio_BT)
            terms["kl"] = aggregate.total(divergence_BT, sequences_BT)

        tokens = PredictedTokens(
            mask_BT=mask_BT,
            logprobs_BT=logprobs_BT,
            entropy_BT=entropy_BT,
            old_logprobs_BT=old_logprobs_BT,
            sampler_logprobs_BT=predicted(batch, "sampler_logprobs"),
            ratio_BT=ratio_BT,
            clipped_BT=clipped_BT,
        )
        for name, metric in TOKEN_METRICS.items():
            terms[name] = jnp.sum(jnp.where(mask_BT, metric(tokens), 0.0))
        terms |= layer_totals(config, train.stage, output.stats)
        gap_BT = jnp.where(fresh(batch), logprob_gap(tokens), 0.0)
        terms[MEAN_GAP] = jnp.sum(gap_BT)
        return Totals(terms, output.stats.router.counts_E, {LARGEST_GAP: jnp.max(gap_BT)})

    terms = [
        *layer_terms(config, train, mtp_depth=0),
        Term("policy", aggregate_weight, coefficient=1.0),
    ]
    if divergence is not None:
        terms.append(Term("kl", aggregate_weight, divergence.coefficient))
    terms += [Term(name, token_count) for name in TOKEN_METRICS]
    terms.append(Term(MEAN_GAP, lambda batch: jnp.sum(fresh(batch), dtype=jnp.float32)))
    return Objective(tuple(terms), totals, signal=rewards_differ)


def rewards_differ(batch: Batch) -> Array:
    """Returns whether any token that is learnt from has an advantage, a bool scalar.

    Without one there is no step, a divergence or not: the optimizer would make a step of full size
    of whatever gradient is left, be it the rounding of a divergence from a reference that the
    policy has not left.
    """
    return jnp.any(batch["mask"] & (batch["advantages"] != 0))


def old_of(batch: Batch, logprobs_BT: Array) -> Array:
    """Returns the log-probs that the ratio is taken to, without a gradient.

    Where the batch says "on_policy" they are the policy's own, as this very program computes them:
    the ratio is then 1, nothing is clipped and the divergence from the old policy is 0, to the bit
    and in any dtype. Another program, though of the same weights, would differ in last bits.
    """
    old_BT = predicted(batch, "old_logprobs")
    if "on_policy" not in batch:
        return old_BT
    return jnp.where(batch["on_policy"][:, None], jax.lax.stop_gradient(logprobs_BT), old_BT)


def predicted(batch: Batch, name: str) -> Array:
    """Returns an array of the batch, [B, T], moved to where its tokens are predicted.

    Position t then has the value of token t + 1, and the last position has 0.
    """
    return shift_left(batch[name], 1)


def predicted_sequences(batch: Batch) -> Array:
    """Returns which sequence of its row the next token belongs to, where it was sampled.

    Elsewhere it is 0, [B, T]: what an aggregation takes (rl/aggregations.py).
    """
    return jnp.where(predicted(batch, "mask"), predicted(batch, "segments"), 0)


def fresh(batch: Batch) -> Array:
    """Returns which next tokens were sampled with the weights that the step began with, [B, T]."""
    mask_BT = predicted(batch, "mask")
    return mask_BT & ~predicted(batch, "stale") if "stale" in batch else mask_BT


def forward_logprobs(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: Batch
) -> tuple[Array, Array, Output]:
    """Runs the model and scores the next token at each position.

    Where the batch has "routes" or "selected", tokens go to those experts and attend to those keys;
    where it has "support", log-probs are those of the distribution over it.

    Args:
      stage: "dense" or "sparse" attention.
      temperature: of sampling; 0 (greedy) reads as 1, as the sampler's own log-probs do.

    Returns:
      Log-probs and entropy [B, T], float32 in nats, and the output of the forward pass.
    """
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    given = variables | replay(config, batch.get("routes"), batch.get("selected"))
    output = cast(Output, Transformer(config).apply(given, *inputs, stage=stage, mtp=False))
    logprobs_BT, entropy_BT = token_logprobs(
        config,
        variables["params"],
        output.hidden_BTD,
        predicted(batch, "tokens"),
        temperature or 1.0,
        predicted(batch, "support") if "support" in batch else None,
    )
    return logprobs_BT, entropy_BT, output


def logprobs_at_tokens(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: Batch
) -> Array:
    """Recomputes what `sampler_logprobs` holds, [B, T].

    It is the log-prob of each token of the mask, at the token itself, and 0 elsewhere.
    """
    logprobs_BT, _, _ = forward_logprobs(config, stage, temperature, variables, batch)
    at_token_BT = jnp.pad(logprobs_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(batch["mask"], at_token_BT, 0.0)
