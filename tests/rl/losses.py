"""The loss of an algorithm and its gradient, of given log-probs: no model, the real objective."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.algorithms.row import Algorithm
from rl.objective import policy_terms, policy_totals, predicted, tokens_of
from rl.signals import step_signals, update_signals
from train.mean import Mean
from train.objective import Batch, Objective

LIVE = ("logprobs", "entropy")


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """A batch of rows, each a trajectory with a prompt of one token.

    Args:
      inputs: arrays [B, T] of the completions: mask, logprobs, old, and what else there is of
        sampler, reference, entropy, advantages, values, tokens; group [B].
    """
    mask_BT = np.asarray(inputs["mask"], bool)
    B, T = mask_BT.shape
    group_B = np.asarray(inputs.get("group", np.arange(B)))

    def with_prompt(x: Any, fill: Any = 0) -> np.ndarray:
        x_BT = np.asarray(x)
        x_BT = x_BT if x_BT.ndim == 2 else np.broadcast_to(x_BT[:, None], (B, T))
        return np.pad(x_BT, ((0, 0), (1, 0)), constant_values=fill)

    # A completion ends with its last token that is learnt from.
    ends_B = T - np.argmax(mask_BT[:, ::-1], axis=1)
    ends_B = np.where(mask_BT.any(axis=1), ends_B, 1)
    inside_BT = np.arange(T + 1) <= ends_B[:, None]
    names = {
        "sampler": "sampler_logprobs",
        "old": "old_logprobs",
        "reference": "reference_logprobs",
        "advantages": "advantages",
        "old_entropy": "old_entropy",
        "old_values": "old_values",
        "logprobs": "logprobs",
        "entropy": "entropy",
        "tokens": "tokens",
        "correction": "correction",
        "counted": "weights",
    }
    inputs = {"sampler": inputs["old"], "tokens": np.zeros((B, T), np.int32)} | dict(inputs)
    batch = {to: with_prompt(inputs[name]) for name, to in names.items() if name in inputs}
    batch |= {
        "mask": with_prompt(mask_BT),
        "segments": inside_BT.astype(np.int32),
        "positions": np.where(inside_BT, np.arange(T + 1), 0),
        "trajectory": np.where(inside_BT, np.arange(B)[:, None], -1),
        "group": np.where(inside_BT, group_B[:, None], -1),
        "versions": np.where(with_prompt(mask_BT), 0, -1),
    }
    if "on_policy" in inputs:
        batch["on_policy"] = np.asarray(inputs["on_policy"])
    smaller = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    return {name: jnp.asarray(x.astype(smaller.get(x.dtype, x.dtype))) for name, x in batch.items()}


def paid_of(inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What `rl.signals.step_signals` takes: rewards [B] or [M, B], and groups of any size."""
    rewards_MN = np.atleast_2d(np.asarray(inputs["rewards"], np.float32))
    weights_M = np.asarray(inputs.get("weights", np.ones(len(rewards_MN))), np.float32)
    B = rewards_MN.shape[1]
    _, groups_N = np.unique(np.asarray(inputs.get("group", np.arange(B))), return_inverse=True)
    outcome_N = np.zeros(B, np.float32)
    for weight, paid_N in zip(weights_M, rewards_MN, strict=True):
        outcome_N = outcome_N + weight * paid_N
    paid = {
        "rewards_MN": rewards_MN,
        "weights_M": weights_M,
        "outcome_N": outcome_N,
        "groups_N": groups_N.astype(np.int32),
        "present_N": np.asarray(inputs.get("present", np.ones(B)), bool),
    }
    if "greedy" in inputs:
        paid["greedy_N"] = np.asarray(inputs["greedy"], np.float32)
    return {name: jnp.asarray(x) for name, x in paid.items()}


def signals(algorithm: Algorithm, batch: Batch, paid: Mapping[str, jax.Array]) -> Batch:
    """The batch with what a step, and then an update, are told."""
    given = batch.get("advantages")
    batch = batch | step_signals(algorithm, batch, paid)
    if given is not None:
        batch["advantages"] = given
    if algorithm.selection is not None:
        names = zip(("current_logprobs", "current_entropy"), LIVE, strict=True)
        current = {name: batch.get(live, batch["logprobs"]) for name, live in names}
        batch |= update_signals(algorithm, batch | current, jax.random.key(0))
    return batch


def weights_of(algorithm: Algorithm, batch: Batch) -> dict[str, jax.Array]:
    """What the totals of an algorithm are divided by."""
    return {term.name: term.weight(batch) for term in policy_terms(algorithm)}


def loss_of(
    algorithm: Algorithm, totals: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
) -> jax.Array:
    """The sum of the terms, as the trainer adds them."""
    objective = Objective(tuple(policy_terms(algorithm)), lambda *_: None)  # pyright: ignore
    return objective.loss({name: Mean(total, weights[name]) for name, total in totals.items()})


def loss_and_gradient(algorithm: Algorithm, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss, and its gradient to the log-probs at the token itself."""
    entropy_BT = batch.get("entropy", jnp.zeros_like(batch["logprobs"]))

    def loss(logprobs_BT: jax.Array) -> jax.Array:
        given = batch | {"logprobs": logprobs_BT, "entropy": entropy_BT}
        live = (predicted(given, name) for name in LIVE)
        totals, _ = policy_totals(algorithm, tokens_of(batch, *live), batch)
        return loss_of(algorithm, totals, weights_of(algorithm, batch))

    return jax.value_and_grad(loss)(batch["logprobs"])
