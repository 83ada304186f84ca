"""One optimizer step, for any objective."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from kernels.device import compiler_options
from model.config import ModelConfig
from model.sharding import batch_sharding, replicated
from train.balance import expert_load, update_router
from train.config import TrainConfig
from train.mean import Mean
from train.objective import Batch, Objective, Totals, means_of, split_microbatches
from train.optimizer import is_indexer, path_of, schedule, trainable
from train.state import StateOverBase, TrainState, state_shardings

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_step(
    config: ModelConfig,
    train: TrainConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> Step:
    """Returns a function (state, batch) -> (state, metrics), to be jitted with the state donated.

    A step whose gradients are not finite, or whose batch has no signal (`Objective.signal`),
    changes nothing but its counters. Metrics are float32 scalars, and expert_load of the MoE layers
    [L, E]. In the stages in which an indexer may learn, indexer_grad_norm is the norm of the
    gradient of all indexers' parameters, before it is clipped: 0 where they are frozen.
    """
    learning_rate = schedule(train)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Takes one step: gradients, the optimizer, the biases of the router, and metrics."""
        mask = trainable(train, state.params)
        gradients, means, totals = loss_and_gradient(
            objective, mask, state, batch, train.microbatches
        )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            router = state.router
            if train.stage != "warmup":
                router = update_router(config, router, totals.counts_LE, train.router_bias_rate)
            signal = objective.signal(batch) if objective.signal else jnp.asarray(True)
            new_state = next_state(
                state, params, router, opt_state, finite=jnp.isfinite(norm), signal=signal
            )
        metrics = {name: mean.value for name, mean in means.items()} | totals.maxima
        metrics |= totals.minima | {
            "loss": objective.loss(means),
            "grad_norm": norm,
            # The optimizer's own count: it does not see skipped steps.
            "learning_rate": learning_rate(state.step - state.skipped),
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        if train.stage != "dense":
            metrics["indexer_grad_norm"] = indexer_norm(gradients)
        return new_state, metrics | expert_load_metrics(config, totals.counts_LE)

    return step


def indexer_norm(gradients: dict) -> Array:
    """Returns the norm of the gradients of all indexers' parameters, a float32 scalar."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    of_indexers = [leaf for path, leaf in leaves if is_indexer(path_of(path))]
    return jnp.asarray(optax.tree.norm(of_indexers), jnp.float32)


def loss_and_gradient(
    objective: Objective, mask: dict, state: TrainState, batch: Batch, microbatches: int
) -> tuple[dict, dict[str, Mean], Totals]:
    """Differentiates the loss over the global batch, one microbatch after another.

    Args:
      mask: a tree of bools, which parameters learn. The gradients of the others are zero, and their
        backward pass is not computed.

    Returns:
      (gradients, the terms as means over the global batch, their totals and the rest).
    """
    weights = objective.weights(batch)

    def loss(params: dict, microbatch: Batch) -> tuple[Array, Totals]:
        params = jax.tree.map(
            lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf), params, mask
        )
        totals = objective.totals(state.variables_with(params), microbatch)
        return objective.loss(means_of(totals, weights)), totals

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        gradients, totals = gradient(state.params, batch)
        return gradients, means_of(totals, weights), totals

    def accumulate(sums: tuple[dict, Totals], microbatch: Batch) -> tuple:
        gradients, totals = gradient(state.params, microbatch)
        return (jax.tree.map(jnp.add, sums[0], gradients), sums[1] + totals), None

    batches = split_microbatches(batch, microbatches)
    shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[0])
    (gradients, totals), _ = jax.lax.scan(accumulate, (zeros, shapes[1].before_any()), batches)
    return gradients, means_of(totals, weights), totals


def next_state(
    state: TrainState,
    params: optax.Params,
    router: dict,
    opt_state: optax.OptState,
    finite: Array,
    signal: Array,
) -> TrainState:
    """Returns the next state: the new trees if the step is taken, else the old ones.

    Args:
      finite: whether the gradients were.
      signal: whether the batch had anything to learn from.
    """
    takes = finite & signal
    taken = jax.tree.map(
        lambda new, old: jnp.where(takes, new, old),
        (params, router, opt_state),
        (state.params, state.router, state.opt_state),
    )
    params, router, opt_state = taken
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        router=router,
        opt_state=opt_state,
        skipped=state.skipped + ~takes,
        # A step without signal is no sign that the gradients are finite again.
        skipped_in_row=jnp.where(takes, 0, state.skipped_in_row + ~finite),
    )


def expert_load_metrics(config: ModelConfig, counts_LE: Array) -> dict[str, Array]:
    """Returns the expert load of the MoE layers [L, E], MTP modules last, and its maximum."""
    if not config.moe_layers:
        return {}
    mtp_modules = counts_LE.shape[0] - config.num_hidden_layers
    kinds = (*config.kinds, *[config.mtp_kind] * mtp_modules)
    expert_load_LE = expert_load(counts_LE[np.asarray([kind.moe for kind in kinds])])
    return {"expert_load_max": jnp.max(expert_load_LE), "expert_load": expert_load_LE}


def abstract_batch(
    rows: int, length: int, mesh: Mesh, more: tuple[str, ...] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and sharding of a training batch (data/packing.py), each [B, T].

    Args:
      more: names of further arrays, float32.
    """
    types = {
        "tokens": jnp.int32,
        "positions": jnp.int32,
        "segments": jnp.int32,
        "weights": jnp.float32,
    } | dict.fromkeys(more, jnp.float32)
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in types.items()
    }


def jit_step(step: Step, state: TrainState, mesh: Mesh) -> Any:
    """Jits a step, to be run or only compiled.

    The state is donated, but for what is frozen in it, and the next one is laid out as `state`, an
    abstract one, is.

    Returns:
      A `jax.stages.Wrapped`, or a `StepOverBase`.
    """
    jitted = functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(state_shardings(state.learnt), replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )
    if not isinstance(state, StateOverBase):
        return jitted(step)
    scale = state.scale

    def learn(learnt: TrainState, base: dict, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        new, metrics = step(StateOverBase.of(learnt, base, scale), batch)
        return new.learnt, metrics

    return StepOverBase(jitted(learn))


class StepOverBase:
    """A step of adapters: (state, batch) -> (state, metrics), the base left as it is.

    The program takes the base as an argument of its own, which is not donated: who else holds these
    arrays, as the reference of reinforcement, goes on to do so.

    Args:
      program: (learnt, base, batch) -> (learnt, metrics), jitted, lowered or compiled.
    """

    def __init__(self, program: Any):
        self.program = program

    def __call__(self, state: StateOverBase, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Takes a step; the state but for its base is donated."""
        learnt, metrics = self.program(state.learnt, state.base, batch)
        return state.with_learnt(learnt), metrics

    def lower(self, state: StateOverBase, batch: Batch) -> "StepOverBase":
        """Lowers the program for abstract arguments."""
        return StepOverBase(self.program.lower(state.learnt, state.base, batch))

    def compile(self) -> "StepOverBase":
        """Compiles the program once it is lowered."""
        return StepOverBase(self.program.compile())


def jit_evaluation(objective: Objective, mesh: Mesh) -> Callable[[dict, Batch], dict[str, Mean]]:
    """Returns a function (variables, batch) -> means: to be added over batches, then divided."""

    def evaluate(variables: dict, batch: Batch) -> dict[str, Mean]:
        return means_of(objective.totals(variables, batch), objective.weights(batch))

    return jax.jit(evaluate, compiler_options=compiler_options(mesh))
