"""What an update is told beside the tokens: advantages, corrections, and what is left out.

`step_signals` is computed once over all that a step has sampled, and `update_signals` over all that
an update learns from. Whatever couples the tokens of a batch is in one of them: a loss made of a
microbatch at a time cannot see the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import compiler_options
from model.segments import shift_left
from model.sharding import batch_sharding
from rl.algorithms.corrections import correction, within
from rl.algorithms.divergences import ESTIMATORS, bounded
from rl.algorithms.experience import Experience
from rl.algorithms.row import Algorithm
from rl.algorithms.sequences import Sequences
from rl.objective import gain_of, tokens_of
from train.objective import Batch
from train.scoring import predicted
from train.setup import Setup


def step_signals(algorithm: Algorithm, batch: Batch, paid: Mapping[str, Array]) -> Batch:
    """Returns what the batch of a step gains, [B, T] each, at the token itself.

    Args:
      batch: of `rl.trajectory.batch_of`, with old_logprobs, and what the algorithm needs of
        reference_logprobs, old_entropy and old_values.
      paid: of `rl.pay.Rewards.arrays`.

    Returns:
      "mask", without what a rejection removes, and "advantages"; where the algorithm has them
      "returns", "correction", "weights" and "group_tokens".
    """
    options, mask_BT = algorithm.options, batch["mask"]
    signals = {}
    if options.correction or options.rejection:
        given = _log_mismatch(batch)
        if options.correction:
            bounds = options.correction_low, options.correction_high
            weights_BT = correction(
                options.correction, *given, *bounds, options.correction_mean_one
            )
            signals["correction"] = jnp.where(mask_BT, weights_BT, 0.0)
        if options.rejection:
            bounds = options.rejection_low, options.rejection_high
            kept_BT = within(options.rejection, *given, *bounds)
            if options.rejected == "removed":
                mask_BT = mask_BT & kept_BT
            else:
                signals["weights"] = kept_BT.astype(jnp.float32)
    experience = experience_of(algorithm, batch | {"mask": mask_BT}, paid)
    found = algorithm.advantage(experience)
    signals |= {"mask": mask_BT, "advantages": jnp.where(mask_BT, found.advantages_BT, 0.0)}
    if found.returns_BT is not None:
        signals["returns"] = found.returns_BT
    if found.weights_BT is not None:
        signals["weights"] = found.weights_BT * signals.get("weights", 1.0)
    if "group_tokens" in algorithm.needs:
        signals["group_tokens"] = experience.at_tokens(experience.group_sum(experience.lengths_N))
    return signals


def experience_of(algorithm: Algorithm, batch: Batch, paid: Mapping[str, Array]) -> Experience:
    """Returns the experience of a step, as the advantage of an algorithm takes it."""
    options, needs = algorithm.options, algorithm.needs
    old_BT, reference_BT = batch["old_logprobs"], batch.get("reference_logprobs")
    experience = Experience(
        **paid,
        trajectory_BT=batch["trajectory"],
        mask_BT=batch["mask"],
        tokens_BT=batch["tokens"],
        old_BT=old_BT,
        reference_BT=reference_BT,
        entropy_BT=batch["old_entropy"] if "entropy" in needs else None,
        values_BT=batch["old_values"] if "values" in needs else None,
    )
    if options.kl and options.kl_in == "reward":
        assert reference_BT is not None
        estimator = bounded(
            ESTIMATORS[options.kl_estimator], options.kl_log_clamp, options.kl_clamp
        )
        divergence_BT = estimator(old_BT, reference_BT, jnp.ones(old_BT.shape))
        experience = dataclasses.replace(experience, penalty_BT=options.kl * divergence_BT)
    return experience


def update_signals(algorithm: Algorithm, batch: Batch, key: Array) -> Batch:
    """Returns what the batch of an update gains where the algorithm singles tokens out.

    Args:
      batch: with the signals of the step, and "current_logprobs" and "current_entropy" of the
        policy as it is.
      key: of the lots that are drawn.

    Returns:
      "chosen", bool [B, T] at the token itself; and "mask" where the chosen leave it.
    """
    selection = algorithm.selection
    assert selection is not None
    logprobs_BT, entropy_BT = (
        predicted(batch, name) for name in ("current_logprobs", "current_entropy")
    )
    tokens = tokens_of(batch, logprobs_BT, entropy_BT)
    nothing_BT = jnp.zeros(tokens.mask_BT.shape, bool)
    _, gain = gain_of(algorithm, dataclasses.replace(tokens, chosen_BT=nothing_BT))
    lots_BT = shift_left(_lots(batch, key), 1)
    chosen_BT = selection.choose(tokens, gain.low_BT | gain.high_BT, lots_BT)
    signals = {"chosen": jnp.pad(chosen_BT[:, :-1], ((0, 0), (1, 0)))}
    if selection.effect == "removed":
        signals["mask"] = batch["mask"] & ~signals["chosen"]
    return signals


def jit_step_signals(setup: Setup, algorithm: Algorithm) -> Callable[[Batch, Any], Batch]:
    """Returns the jitted (batch, paid) -> `step_signals`, laid out as a batch is."""
    return jax.jit(
        functools.partial(step_signals, algorithm),
        out_shardings=batch_sharding(setup.mesh),
        compiler_options=compiler_options(setup.mesh),
    )


def jit_update_signals(setup: Setup, algorithm: Algorithm) -> Callable[[Batch, Array], Batch]:
    """Returns the jitted (batch, key) -> `update_signals`, laid out as a batch is."""
    return jax.jit(
        functools.partial(update_signals, algorithm),
        out_shardings=batch_sharding(setup.mesh),
        compiler_options=compiler_options(setup.mesh),
    )


def _log_mismatch(batch: Batch) -> tuple[Array, Sequences]:
    """Returns log pi_old - log pi_sampler at the token itself, 0 where nothing is learnt from."""
    mask_BT = batch["mask"]
    log_BT = jnp.where(mask_BT, batch["old_logprobs"] - batch["sampler_logprobs"], 0.0)
    numbers_BT = jnp.where(mask_BT, batch["segments"], 0)
    return log_BT, Sequences(numbers_BT, jnp.max(batch["segments"], axis=1))


def _lots(batch: Batch, key: Array) -> Array:
    """Returns a number from [0, 1) for each token, by its trajectory and its place there."""

    def lot(trajectory: Array, position: Array) -> Array:
        of_token = jax.random.fold_in(jax.random.fold_in(key, trajectory), position)
        return jax.random.uniform(of_token)

    return jax.vmap(jax.vmap(lot))(batch["trajectory"] + 1, batch["positions"])
