"""The critic of PPO: a model of its own that says what is still to be earned, token by token.

It is the policy's architecture without output head and MTP modules, with a linear head for the
value. It begins as the policy that reinforcement starts from, or as a critic of another run; the
value's head begins at 0. Its state is part of the run's (`train.state.TrainState.critic`), and no
export has it.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from checkpoints.restore import restore_parameters
from errors import UserError
from kernels.device import compiler_options
from model.config import ModelConfig
from model.record import replay
from model.sharding import Named, ParameterUse
from model.transformer import Output, Transformer, boxed_shapes
from rl.config import ReinforceConfig
from train.config import TrainConfig
from train.objective import Batch, Objective, Term, Totals, layer_terms, layer_totals
from train.optimizer import make_optimizer
from train.scoring import in_parts, predicted
from train.setup import Setup
from train.state import TrainState, abstract_state, state_from
from train.step import Step, jit_step, make_step

_PARAMETERS = "value"  # of the head, beside those of the trunk


def critic_model(model: ModelConfig) -> ModelConfig:
    """Returns the config of the critic's trunk: the policy's without what only it needs."""
    return dataclasses.replace(model, tie_word_embeddings=True, num_nextn_predict_layers=0)


def critic_shapes(model: ModelConfig) -> dict[str, Any]:
    """Returns the shapes of the critic's variables in their boxes, as `boxed_shapes` does."""
    boxed = boxed_shapes(critic_model(model))
    use = ParameterUse(per_channel=True)

    def head(shape: tuple[int, ...]) -> Named:
        return Named(jax.ShapeDtypeStruct(shape, jnp.float32), (None,) * len(shape), use=use)

    value = {"kernel": head((model.hidden_size,)), "bias": head(())}
    return {"params": boxed["params"] | {_PARAMETERS: value}, "router": boxed["router"]}


class Critic:
    """Scores and updates a critic.

    Args:
      train: the section `train`, its steps counted in updates, which the critic learns by, but for
        its learning rate.
      reinforce: `critic_learning_rate`, `value_clip`, and how a step is cut.

    Raises:
      UserError: the policy learns by adapters.
    """

    def __init__(self, setup: Setup, train: TrainConfig, reinforce: ReinforceConfig):
        if train.lora:
            raise UserError(
                f"train.lora = {train.lora}: reinforce.algorithm = {reinforce.algorithm!r} has a "
                "critic, a whole model that learns with moments of its own; use an algorithm "
                "without one, such as grpo, or train.lora = 0"
            )
        self._setup = setup
        rate = reinforce.critic_learning_rate or 10 * train.learning_rate
        self._train = dataclasses.replace(train, learning_rate=rate, mtp_weight=0.0, trainable=".*")
        self.boxed = critic_shapes(setup.model)
        self.optimizer = make_optimizer(self._train, self.boxed["params"])
        model = critic_model(setup.model)
        self.abstract = abstract_state(model, self.optimizer, setup.mesh, self.boxed)
        parts = reinforce.minibatches * train.microbatches
        values = functools.partial(values_at_tokens, model, train.stage)
        self.score: Callable[[dict, Batch], Array] = jax.jit(
            in_parts(values, parts), compiler_options=compiler_options(setup.mesh)
        )
        objective = value_objective(model, self._train, reinforce.value_clip)
        step = make_step(model, self._train, objective, self.optimizer)
        self._step: Step = jit_step(step, self.abstract, setup.mesh)

    def from_policy(self, variables: dict) -> TrainState:
        """Returns a new state whose trunk is a policy's."""
        model = critic_model(self._setup.model)
        trunk = jax.tree.map(jnp.copy, variables)
        wanted = self.boxed["params"].keys() - {_PARAMETERS}
        params = {name: trunk["params"][name] for name in wanted}
        params[_PARAMETERS] = jax.tree.map(
            lambda box: jnp.zeros(box.value.shape, box.value.dtype),
            self.boxed["params"][_PARAMETERS],
            is_leaf=lambda x: isinstance(x, Named),
        )
        given = {"params": params, "router": trunk["router"]}
        return state_from(given, model, self.optimizer, self._setup.mesh, self.boxed)

    def from_run(self, path: str) -> TrainState:
        """Returns a new state with the parameters of another run's critic.

        Raises UserError if that run has no critic, or one of another shape.
        """
        wanted = {"params": self.abstract.params, "router": self.abstract.router}
        try:
            found = restore_parameters(Path(path), {"critic": wanted})["critic"]
        except UserError as error:
            raise UserError(f"reinforce.critic_from = {path!r}: {error}") from error
        model = critic_model(self._setup.model)
        return state_from(found, model, self.optimizer, self._setup.mesh, self.boxed)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Learns from a minibatch, with "returns" and "old_values"; the state is donated.

        Returns the state, and metrics under "critic/".
        """
        names = ("tokens", "positions", "segments", "mask", "returns", "old_values")
        given = {name: batch[name] for name in (*names, "routes", "selected") if name in batch}
        state, values = self._step(state, given)
        kept = {name: value for name, value in values.items() if value.ndim == 0}
        return state, {f"critic/{name}": value for name, value in explained(kept).items()}


def values_at_tokens(model: ModelConfig, stage: str, variables: dict, batch: Batch) -> Array:
    """Returns the value of what comes before each token of the mask, at the token, [B, T].

    It is float32, and 0 elsewhere.
    """
    values_BT, _ = forward_values(model, stage, variables, batch)
    return jnp.where(batch["mask"], jnp.pad(values_BT[:, :-1], ((0, 0), (1, 0))), 0.0)


def forward_values(
    model: ModelConfig, stage: str, variables: dict, batch: Batch
) -> tuple[Array, Output]:
    """Runs the critic: the value at each position, [B, T] float32, and the trunk's output."""
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    given = variables | replay(model, batch.get("routes"), batch.get("selected"))
    output = cast(Output, Transformer(model).apply(given, *inputs, stage=stage, mtp=False))
    head = variables["params"][_PARAMETERS]
    with jax.named_scope("value_head"):
        hidden_BTD = output.hidden_BTD.astype(jnp.float32)
        return jnp.einsum("btd,d->bt", hidden_BTD, head["kernel"]) + head["bias"], output


def value_objective(model: ModelConfig, train: TrainConfig, clip: float) -> Objective:
    """Builds the critic's objective (PPO's code; arXiv 2006.05990, section 3.2, has it in words).

        1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), a mean over tokens

    Args:
      clip: how far a value may move, in units of the reward; 0 does not clip.
    """

    def token_count(batch: Batch) -> Array:
        return jnp.sum(predicted(batch, "mask"), dtype=jnp.float32)

    def totals(variables: dict, batch: Batch) -> Totals:
        values_BT, output = forward_values(model, train.stage, variables, batch)
        returns_BT, mask_BT = predicted(batch, "returns"), predicted(batch, "mask")
        old_BT = predicted(batch, "old_values")
        loss_BT, clipped_BT = value_loss(values_BT, old_BT, returns_BT, clip)
        by_name = {
            "vf_loss": loss_BT,
            "vf_clipfrac": clipped_BT,
            "vpred_mean": values_BT,
            "returns/mean": returns_BT,
            "returns_squared": jnp.square(returns_BT),
            "error_squared": jnp.square(values_BT - returns_BT),
        }
        terms = {name: jnp.sum(jnp.where(mask_BT, x_BT, 0.0)) for name, x_BT in by_name.items()}
        terms |= layer_totals(model, train.stage, output.stats)
        return Totals(terms, output.stats.router.counts_E, maxima={}, minima={})

    terms = [
        *layer_terms(model, train, mtp_depth=0),
        Term("vf_loss", token_count, coefficient=1.0),
    ]
    names = ("vf_clipfrac", "vpred_mean", "returns/mean", "returns_squared", "error_squared")
    terms += [Term(name, token_count) for name in names]
    return Objective(tuple(terms), totals, signal=lambda batch: jnp.any(batch["mask"]))


def value_loss(
    values_BT: Array, old_BT: Array, returns_BT: Array, clip: float
) -> tuple[Array, Array]:
    """Returns the loss of each token's value, and where the clipped one counts, [B, T] each."""
    loss_BT = jnp.square(values_BT - returns_BT)
    if not clip:
        return loss_BT / 2, jnp.zeros(loss_BT.shape, bool)
    near_BT = jnp.clip(values_BT, old_BT - clip, old_BT + clip)
    clipped_BT = jnp.square(near_BT - returns_BT)
    return jnp.maximum(loss_BT, clipped_BT) / 2, clipped_BT > loss_BT


def explained(values: dict[str, Array]) -> dict[str, Array]:
    """Returns metrics with "vf_explained_var" in place of the squares that it is made of.

    It is 1 - mean (V - R)^2 / var R: 1 for a critic that knows, 0 for one that says the mean.
    """
    values = dict(values)
    variance = values.pop("returns_squared") - jnp.square(values["returns/mean"])
    error = values.pop("error_squared")
    share = jnp.where(variance > 1e-12, 1 - error / jnp.maximum(variance, 1e-12), 0.0)
    return values | {"vf_explained_var": share}
