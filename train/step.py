"""One optimizer step, for any objective."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from model.config import ModelConfig
from model.sharding import batch_sharding, replicated
from train.balance import expert_load, move_router
from train.config import TrainConfig
from train.objective import Objective, Totals, split_microbatches, weighted_loss
from train.optimizer import schedule, trainable
from train.state import TrainState, state_shardings

Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


def loss_and_gradient(
    objective: Objective, mask: dict, state: TrainState, batch: dict[str, Array], pieces: int
) -> tuple[dict, Totals, dict[str, Array]]:
    """Gradients of the loss over the global batch, taken `pieces` microbatches one after another.

    Returns (gradients, totals, weights). Gradients of frozen parameters are zero, and their
    backward pass is not computed.
    """
    weights = objective.weights(batch)

    def loss(params, piece):
        params = jax.tree.map(
            lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf), params, mask
        )
        totals = objective.totals({"params": params, "router": state.router}, piece)
        return weighted_loss(objective, totals.terms, weights), totals

    gradient = jax.grad(loss, has_aux=True)
    if pieces == 1:
        return *gradient(state.params, batch), weights

    def accumulate(so_far, piece):
        gradients, totals = gradient(state.params, piece)
        return (jax.tree.map(jnp.add, so_far[0], gradients), so_far[1] + totals), None

    batches = split_microbatches(batch, pieces)
    shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes
    )  # maxima are of absolute values: 0 is their least
    (gradients, totals), _ = jax.lax.scan(accumulate, zeros, batches)
    return gradients, totals, weights


def make_step(
    config: ModelConfig,
    train: TrainConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> Step:
    """A function (state, batch) -> (state, metrics), to be jitted with the state donated.

    A step whose gradients are not finite changes nothing but its counters. Metrics are float32
    scalars, and expert_load of the MoE layers [L', E].
    """
    learning_rate = schedule(train)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        mask = trainable(train, state.params)
        gradients, totals, weights = loss_and_gradient(
            objective, mask, state, batch, train.microbatches
        )
        counts_LE = totals.counts_LE
        with jax.named_scope("optimizer"):
            norm = optax.global_norm(gradients)
            finite = jnp.isfinite(norm)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            router = (
                move_router(config, state.router, counts_LE, train.router_bias_rate)
                if train.stage != "warmup"
                else state.router
            )
            kept = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, router, opt_state),
                (state.params, state.router, state.opt_state),
            )
        skipped = (~finite).astype(jnp.int32)
        new_state = TrainState(
            state.step + 1,
            *kept,
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        metrics = {
            name: total / jnp.where(weights[name] == 0, 1, weights[name])
            for name, total in totals.terms.items()
        } | totals.maxima
        metrics |= {
            "loss": weighted_loss(objective, totals.terms, weights),
            "grad_norm": norm,
            "learning_rate": learning_rate(
                state.step - state.skipped
            ),  # the optimizer's own count: it does not see skipped steps
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        if config.moe_layers:
            kinds = (
                *config.kinds,
                *[config.mtp_kind] * (counts_LE.shape[0] - config.num_hidden_layers),
            )
            loads_LE = expert_load(counts_LE[np.asarray([kind.moe for kind in kinds])])
            metrics |= {"expert_load_max": jnp.max(loads_LE), "expert_load": loads_LE}
        return new_state, metrics

    return step


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch looks like (data/packing.py), on the devices."""
    types = {
        "tokens": jnp.int32,
        "positions": jnp.int32,
        "segments": jnp.int32,
        "weights": jnp.float32,
    }
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in types.items()
    }


def jit_step(step: Step, state: TrainState, mesh: Mesh):
    """The step to be run or only compiled: the state given away, and the next one laid out as
    `state`, an abstract one, is.
    """
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state), replicated(mesh)))


def make_evaluation(
    objective: Objective,
) -> Callable[[dict, dict[str, Array]], tuple[dict[str, Array], dict[str, Array]]]:
    """(variables, batch) -> (totals, weights): to be added over batches, then divided."""

    def evaluate(variables, batch):
        return objective.totals(variables, batch).terms, objective.weights(batch)

    return evaluate
