"""What the table makes of a recorded case, by the name of each recorded result."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.algorithms.credit import conflict_weights
from rl.algorithms.divergences import ESTIMATORS, bounded
from rl.algorithms.returns import token_rewards
from rl.algorithms.row import Algorithm
from rl.algorithms.spec import get_algorithm
from rl.critic import value_loss
from rl.objective import gain_of, policy_totals, predicted, sequences_of, tokens_of
from rl.objective import weights_of as counted
from rl.pay import overlong_penalty
from rl.signals import experience_of
from tests.rl.golden_specs import Case, Ours, fields_of, named
from tests.rl.losses import LIVE, batch_of, loss_of, paid_of, signals, weights_of
from train.objective import Batch

Results = Mapping[str, Any]


@functools.cache
def algorithm_of(spec: str, longest: int) -> Algorithm:
    return get_algorithm(spec, max_completion=longest)


def found(case: Case, ours: Ours) -> Results:
    """Returns ours of each result that a case has recorded."""
    algorithm = algorithm_of(ours.spec, ours.longest)
    result = {
        "loss": loss,
        "advantage": advantage,
        "weight": weight,
        "mask": mask,
        "divergence": divergence,
        "value": aggregation,
        "aggregation": aggregation,
        "entropy": aggregation,
        "reward": reward,
    }[case["kind"]]
    # A loop over tokens, or completions, would be compiled anew for each case.
    loops = case["kind"] == "advantage" or algorithm.name == "gtpo_conflict"
    with jax.disable_jit(loops):
        return result(case, ours, algorithm)


def batch_with(case: Case, given: Mapping[str, Any]) -> tuple[Batch, dict[str, Any]]:
    """Returns the batch of a case, and its fields."""
    fields = {**fields_of(case), **given}
    fields |= {"old_entropy": fields["entropy"]} if "entropy" in fields else {}
    fields = {"rewards": np.zeros(len(fields["mask"]))} | fields
    return batch_of({"old": fields["mask"] * 0.0, **fields}), fields


def loss(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns the loss and its gradients at the tokens."""
    batch, fields = batch_with(case, ours.fields)
    options = algorithm.options
    asked = options.correction or options.rejection or algorithm.selection
    if ours.rewarded:
        batch.pop("advantages", None)
    if asked or "group_tokens" in algorithm.needs or ours.rewarded:
        batch |= _told(case, ours, algorithm, batch, fields)
    entropy_BT = batch.get("entropy", jnp.zeros_like(batch["logprobs"]))
    of_tokens = options.entropy_mean == "token"

    def value(logprobs_BT: jax.Array, entropy_BT: jax.Array) -> jax.Array:
        given = batch | {"logprobs": logprobs_BT, "entropy": entropy_BT}
        live = (predicted(given, name) for name in LIVE)
        totals, _ = policy_totals(algorithm, tokens_of(batch, *live), batch)
        weights: dict[str, Any] = dict(weights_of(algorithm, batch))
        if ours.weight is not None:
            of_row = [name for name in weights if name != "entropy_bonus" or not of_tokens]
            weights |= dict.fromkeys(of_row, jnp.float32(ours.weight))
        if ours.entropy_weight is not None:
            weights |= {"entropy_bonus": jnp.float32(ours.entropy_weight)}
        return loss_of(algorithm, totals, weights)

    with_entropy = "entropy_gradient" in case
    which = (0, 1) if with_entropy else 0
    total, slopes = jax.value_and_grad(value, which)(batch["logprobs"], entropy_BT)
    counted_BT = jnp.ones_like(entropy_BT)
    for name in ("correction", "weights"):
        counted_BT = counted_BT * batch.get(name, 1.0)
    found = {"loss": total, "weights": counted_BT[:, 1:]}
    if not with_entropy:
        return found | {"gradient": slopes[:, 1:]}
    return found | {"gradient": slopes[0][:, 1:], "entropy_gradient": slopes[1][:, 1:]}


def _told(case: Case, ours: Ours, algorithm: Algorithm, batch: Batch, fields: dict) -> Batch:
    """Returns what the step, and the update, add to a batch."""
    before = batch
    if ours.step:
        before, fields = batch_with(case, {**ours.fields, **ours.step})
    told = signals(algorithm, before, paid_of(fields))
    added = ("mask", "weights", "correction", "chosen", "group_tokens", "advantages")
    return {name: told[name] for name in added if name in told}


def advantage(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns advantages, and returns, at the tokens."""
    batch, fields = batch_with(case, ours.fields)
    batch.pop("advantages", None)
    told = signals(algorithm, batch, paid_of(fields))
    found = {"advantages": told["advantages"]}
    if "rewards" in case:
        found["rewards"] = token_rewards(experience_of(algorithm, batch, paid_of(fields)))
    if "returns" in told:
        found["returns"] = told["returns"]
    if ours.returns:
        of_returns = algorithm_of(ours.returns, ours.longest)
        found["returns"] = signals(of_returns, batch, paid_of(fields))["advantages"]
    return {name: x[:, 1:] for name, x in found.items()}


def weight(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns the weights between sampler and trainer, at the tokens, and what is kept."""
    batch, fields = batch_with(case, ours.fields)
    if algorithm.name == "vespo":
        return {"weights": gamma_weights(algorithm, batch)[:, :-1]}
    told = signals(algorithm, batch, paid_of(fields))
    found = {"weights": told.get("correction", told["mask"]), "mask": told["mask"]}
    return {name: x[:, 1:] for name, x in found.items()}


def gamma_weights(algorithm: Algorithm, batch: Batch) -> jax.Array:
    """Returns what VESPO weighs A log pi with: its slope by log pi over A."""
    signs_BT = jnp.where(predicted(batch, "advantages") < 0, -1.0, 1.0)
    logprobs_BT = predicted(batch, "logprobs")

    def total(x_BT: jax.Array) -> jax.Array:
        tokens = tokens_of(batch, x_BT, jnp.zeros_like(x_BT))
        tokens = dataclasses.replace(tokens, advantages_BT=signs_BT)
        return jnp.sum(gain_of(algorithm, tokens)[1].gain_BT)

    return jax.grad(total)(logprobs_BT) * signs_BT


def mask(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns which tokens are kept, by the step, the update and the loss."""
    if algorithm.name == "gtpo_conflict":
        return conflicting(case, ours, algorithm)
    batch, fields = batch_with(case, ours.fields)
    batch |= _told(case, ours, algorithm, batch, fields)
    tokens = tokens_of(batch, *(predicted(batch, name) for name in LIVE))
    kept_BT = jnp.where(tokens.mask_BT, counted(algorithm, tokens, batch), 0.0)
    return {"mask": kept_BT[:, :-1]}


def conflicting(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns GTPO's weights of tokens, and how many of each completion are in conflict."""
    nothing_BT = ours.fields["mask"] * 0.0
    given = {"logprobs": nothing_BT, "old": nothing_BT, "entropy": nothing_BT, **ours.fields}
    batch, fields = batch_with(case, given)
    experience = experience_of(algorithm, batch, paid_of(fields))
    weights_NT, counts_N = conflict_weights(experience, experience.total_N, "reference", 2.0)
    return {"weights": experience.of_table(weights_NT)[:, 1:], "counts": counts_N}


def divergence(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns the divergence of each token, and the gradient of their sum."""
    fields, options = {**fields_of(case), **ours.fields}, algorithm.options
    mask_BT = jnp.asarray(fields["mask"], bool)
    names = ("logprobs", "reference", "old")
    logprobs_BT, reference_BT, old_BT = (jnp.float32(fields[name]) for name in names)
    estimator = bounded(
        ESTIMATORS[str(options.kl_estimator)], options.kl_log_clamp, options.kl_clamp
    )

    def values(x_BT: jax.Array) -> jax.Array:
        return estimator(x_BT, reference_BT, jnp.exp(x_BT - old_BT))

    slope_BT = jax.grad(lambda x_BT: jnp.sum(jnp.where(mask_BT, values(x_BT), 0.0)))(logprobs_BT)
    return {"values": values(logprobs_BT), "gradient": slope_BT}


def aggregation(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns the mean of what a case averages, and its gradient."""
    fields = {**fields_of(case), **ours.fields}
    fields = {"logprobs": fields["mask"] * 0.0, "old": fields["mask"] * 0.0, **fields}
    batch = batch_of({name: fields[name] for name in ("mask", "logprobs", "old")})
    sequences, aggregate = sequences_of(batch), algorithm.aggregate
    weight = aggregate.weight(sequences) if ours.weight is None else ours.weight

    def of_tokens(x: jax.Array) -> jax.Array:
        if case["kind"] == "value":
            old_BT, returns_BT = (jnp.float32(fields[key]) for key in ("old_values", "returns"))
            return value_loss(x, old_BT, returns_BT, ours.fields.get("clip", 0.0))[0]
        if case["kind"] == "entropy":
            logs = jax.nn.log_softmax(x)
            return -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        return x

    def mean(x: jax.Array) -> jax.Array:
        return aggregate.total(jnp.pad(of_tokens(x), ((0, 0), (0, 1))), sequences) / weight

    of = jnp.float32(fields[named(case["gradient_of"])])
    total, slope = jax.value_and_grad(mean)(of)
    return {"loss": total, "gradient": slope}


def reward(case: Case, ours: Ours, algorithm: Algorithm) -> Results:
    """Returns rewards with what long completions lose."""
    fields, options = {**fields_of(case), **ours.fields}, algorithm.options
    lengths_N = np.asarray(fields["mask"]).sum(1)
    penalty_N = overlong_penalty(lengths_N, ours.longest, options.soft_overlong)
    return {"rewards": fields.get("paid", 0.0) + options.overlong_weight * penalty_N}
