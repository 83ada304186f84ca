"""The loss of any row of the algorithm table, as an objective of the ordinary train step.

    loss = - aggregate(weights * surrogate(ratio, advantage)) + coefficient * aggregate(divergence)

The batch is that of rl/trajectory.py with old_logprobs and, where the algorithm asks for them,
reference_logprobs [B, T] added, and the signals of rl/signals.py, advantages among them. Each
stands at the token itself. It may have on_policy too, bool [B]: rows whose old policy is the policy
itself, see `old_of`; and stale, bool [B, T]: tokens that weights of an earlier step sampled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from rl.algorithms.divergences import ESTIMATORS, bounded
from rl.algorithms.options import Options
from rl.algorithms.row import Algorithm
from rl.algorithms.sequences import Sequences
from rl.algorithms.surrogates import Gain
from rl.algorithms.tokens import Tokens
from rl.token_metrics import LOGP_DIFFERENCE, Measured, mean_names, token_totals
from train.config import TrainConfig
from train.objective import Batch, Objective, Term, Totals, layer_terms, layer_totals
from train.scoring import forward_logprobs, predicted


def policy_objective(
    config: ModelConfig, train: TrainConfig, algorithm: Algorithm, temperature: float
) -> Objective:
    """Builds the objective of an algorithm.

    Its terms are the layers' (balance, the indexer's KL), those of `policy_terms`, and the
    metrics of rl/token_metrics.py.

    Args:
      temperature: of sampling, so that the policy is what was sampled from.
    """

    def totals(variables: dict, batch: Batch) -> Totals:
        """Computes the totals of a microbatch: the policy, the divergence, metrics and layers."""
        logprobs_BT, entropy_BT, output = forward_logprobs(
            config, train.stage, temperature, variables, batch
        )
        tokens = tokens_of(batch, logprobs_BT, entropy_BT)
        terms, measured = policy_totals(algorithm, tokens, batch)
        terms |= layer_totals(config, train.stage, output.stats)
        sums, maxima, minima = token_totals(measured, fresh(batch), names)
        return Totals(terms | sums, output.stats.router.counts_E, maxima, minima)

    names = mean_names(algorithm)

    def fresh_count(batch: Batch) -> Array:
        return jnp.sum(fresh(batch), dtype=jnp.float32)

    terms = (
        *layer_terms(config, train, mtp_depth=0),
        *policy_terms(algorithm),
        *(Term(name, token_count) for name in names),
        Term(f"{LOGP_DIFFERENCE}/mean", fresh_count),
    )
    return Objective(terms, totals, signal=has_signal)


def policy_terms(algorithm: Algorithm) -> list[Term]:
    """Lists what an algorithm minimises; the totals are those of `policy_totals`.

    These are "policy_loss" and, where it has them, "kl_loss" and "entropy_bonus".
    """
    options = algorithm.options

    def weight(batch: Batch) -> Array:
        return algorithm.aggregate.weight(sequences_of(batch))

    terms = [Term("policy_loss", weight, coefficient=1.0)]
    if options.kl_in_loss:
        terms.append(Term("kl_loss", weight, options.kl))
    if options.entropy:
        mean = weight if options.entropy_mean == "row" else functools.partial(entropies, options)
        terms.append(Term("entropy_bonus", mean, -options.entropy))
    return terms


def policy_totals(
    algorithm: Algorithm, tokens: Tokens, batch: Batch
) -> tuple[dict[str, Array], Measured]:
    """Returns the totals of `policy_terms` over a microbatch, and what its metrics are made of."""
    options, sequences = algorithm.options, tokens.sequences
    total = functools.partial(algorithm.aggregate.total, sequences=sequences)
    ratio_BT, gain = gain_of(algorithm, tokens)
    terms = {"policy_loss": -total(gain.gain_BT * weights_of(algorithm, tokens, batch))}
    if options.kl_in_loss:
        assert tokens.reference_BT is not None
        kl_ratio_BT = kl_ratio_of(options, tokens, ratio_BT)
        estimator = bounded(
            ESTIMATORS[options.kl_estimator], options.kl_log_clamp, options.kl_clamp
        )
        terms["kl_loss"] = total(estimator(tokens.logprobs_BT, tokens.reference_BT, kl_ratio_BT))
    if options.entropy:
        counted_BT = entropy_mask(options, batch)
        entropy_BT = jnp.where(counted_BT, tokens.entropy_BT, 0.0)
        of_row = options.entropy_mean == "row"
        terms["entropy_bonus"] = total(entropy_BT) if of_row else jnp.sum(entropy_BT)
    return terms, Measured(tokens, ratio_BT, gain)


def kl_ratio_of(options: Options, tokens: Tokens, ratio_BT: Array) -> Array:
    """Returns the ratio by which an unbiased estimator of the divergence goes, [B, T], live."""
    if options.kl_ratio == "row":
        return ratio_BT
    own_BT = jax.lax.stop_gradient(tokens.logprobs_BT)
    to_BT = {"token": tokens.old_BT, "sampler": tokens.sampler_BT, "own": own_BT}[options.kl_ratio]
    return jnp.exp(jnp.where(tokens.mask_BT, tokens.logprobs_BT - to_BT, 0.0))


def entropy_mask(options: Options, batch: Batch) -> Array:
    """Returns the tokens whose entropy is maximised, bool [B, T]."""
    mask_BT = predicted(batch, "mask")
    if options.entropy_of == "kept" and "chosen" in batch:
        mask_BT = mask_BT & ~predicted(batch, "chosen")
    return mask_BT


def entropies(options: Options, batch: Batch) -> Array:
    """Returns how many those are, a float32 scalar."""
    return jnp.sum(entropy_mask(options, batch), dtype=jnp.float32)


def token_count(batch: Batch) -> Array:
    """Returns how many tokens are learnt from, a float32 scalar."""
    return jnp.sum(predicted(batch, "mask"), dtype=jnp.float32)


def gain_of(algorithm: Algorithm, tokens: Tokens) -> tuple[Array, Gain]:
    """Returns the ratio of the policy to the one that sampled, [B, T], and what is maximised."""
    options = algorithm.options
    ratio_BT = algorithm.ratio(tokens)
    has_correction = getattr(algorithm.surrogate, "has_correction", False)
    if has_correction and tokens.correction_BT is not None:
        tokens = dataclasses.replace(tokens, correction_BT=factors_of(options, tokens))
    bounded = options.delta and not getattr(algorithm.surrogate, "has_delta", False)
    seen_BT = jnp.minimum(ratio_BT, options.delta) if bounded else ratio_BT
    gain = algorithm.surrogate(tokens, seen_BT)
    if options.dual_clip:
        least_BT = options.dual_clip * tokens.advantages_BT
        lifted_BT = (tokens.advantages_BT < 0) & (gain.gain_BT < least_BT)
        gain = Gain(
            jnp.where(lifted_BT, least_BT, gain.gain_BT), gain.low_BT, gain.high_BT | lifted_BT
        )
    return ratio_BT, gain


def factors_of(options: Options, tokens: Tokens) -> Array:
    """Returns corrections as factors of tokens, [B, T], whose product is that of a completion."""
    assert tokens.correction_BT is not None
    if not options.correction.startswith("sequence"):
        return tokens.correction_BT
    return tokens.correction_BT ** (1 / tokens.sequences.lengths_BT)


def weights_of(algorithm: Algorithm, tokens: Tokens, batch: Batch) -> Array | float:
    """Returns how much the gain of each token counts, [B, T], without a gradient."""
    weights_BT: Array | float = 1.0
    corrected = getattr(algorithm.surrogate, "has_correction", False)
    if tokens.correction_BT is not None and not corrected:
        weights_BT = weights_BT * tokens.correction_BT
    if "weights" in batch:
        weights_BT = weights_BT * predicted(batch, "weights")
    if algorithm.selection is not None and algorithm.selection.effect != "read":
        assert tokens.chosen_BT is not None
        weights_BT = weights_BT * ~tokens.chosen_BT
    if algorithm.options.off_policy:
        log_BT = tokens.sampler_BT - jax.lax.stop_gradient(tokens.logprobs_BT)
        drift_BT = tokens.sequences.mean(log_BT)
        dropped_BT = (tokens.advantages_BT < 0) & (drift_BT > algorithm.options.off_policy)
        weights_BT = weights_BT * ~dropped_BT
    return weights_BT


def has_signal(batch: Batch) -> Array:
    """Returns whether any token that is learnt from has an advantage, a bool scalar.

    Without one there is no step, a divergence or not: the optimizer would make a step of full size
    of whatever gradient is left, be it the rounding of a divergence from a reference that the
    policy has not left.
    """
    return jnp.any(batch["mask"] & (batch["advantages"] != 0))


def tokens_of(batch: Batch, logprobs_BT: Array, entropy_BT: Array) -> Tokens:
    """Returns what a loss sees of the next tokens.

    Args:
      logprobs_BT, entropy_BT: of the policy, of the next token at each position.
    """

    def given(name: str) -> Array | None:
        return predicted(batch, name) if name in batch else None

    sequences = sequences_of(batch)
    logprobs_BT = jnp.where(sequences.mask_BT, logprobs_BT, 0.0)
    return Tokens(
        sequences=sequences,
        logprobs_BT=logprobs_BT,
        entropy_BT=entropy_BT,
        old_BT=old_of(batch, logprobs_BT),
        sampler_BT=predicted(batch, "sampler_logprobs"),
        advantages_BT=predicted(batch, "advantages"),
        reference_BT=given("reference_logprobs"),
        correction_BT=given("correction"),
        chosen_BT=given("chosen"),
    )


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


def sequences_of(batch: Batch) -> Sequences:
    """Returns which sequence of its row the next token belongs to, where it is learnt from."""
    return Sequences(
        numbers_BT=jnp.where(predicted(batch, "mask"), predicted(batch, "segments"), 0),
        rows_B=jnp.max(batch["segments"], axis=1),
        group_tokens_BT=predicted(batch, "group_tokens") if "group_tokens" in batch else None,
    )


def fresh(batch: Batch) -> Array:
    """Returns which next tokens were sampled with the weights that the step began with, [B, T]."""
    mask_BT = predicted(batch, "mask")
    return mask_BT & ~predicted(batch, "stale") if "stale" in batch else mask_BT
