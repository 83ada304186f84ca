"""How a step learns: what it is compared with, its signals, and its updates on minibatches."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax import ScaleByScheduleState

from kernels.device import compiler_options
from rl.algorithms.row import Algorithm
from rl.batches import minibatches
from rl.clock import Parts
from rl.compared import compared_logprobs, jit_score, left_policy
from rl.config import ReinforceConfig, SamplingConfig
from rl.critic import Critic
from rl.objective import policy_objective
from rl.reference import Reference
from rl.signals import jit_step_signals, jit_update_signals
from train.base import abstract_learnt, abstract_run_state
from train.config import TrainConfig
from train.lora import learnt_shapes
from train.objective import Batch
from train.optimizer import make_optimizer
from train.setup import Setup
from train.state import StateWithCritic, TrainState, state_shardings
from train.step import Step, jit_step, make_step


class Learner:
    """Learns from the batches of a run's steps.

    Args:
      train: the section `train`, of which `per_update` makes the optimizer's.
      algorithm: a row of the table with its options.
      seed: of the order of rows in minibatches, and of lots that are drawn.
      parts: what is measured: "old_log_prob", "ref" and "values", which are scored; "adv", the
        signals; "update_actor" and "update_critic".

    Attributes:
      setup: with the adapters that learn, where train.lora asks for them.
      optimizer: of the policy.
      critic: of the algorithm; None where it has none.
    """

    def __init__(
        self,
        setup: Setup,
        train: TrainConfig,
        sampling: SamplingConfig,
        reinforce: ReinforceConfig,
        algorithm: Algorithm,
        seed: int,
        parts: Parts | None = None,
    ):
        self._parts = parts or Parts()
        self._reinforce, self._algorithm, self._seed = reinforce, algorithm, seed
        scheduled = per_update(train, reinforce.epochs * reinforce.minibatches)
        setup = self.setup = setup.learning(scheduled)
        learnt = learnt_shapes(setup.model, setup.lora)
        self.optimizer = make_optimizer(scheduled, learnt["params"])
        self.critic = Critic(setup, scheduled, reinforce) if "values" in algorithm.needs else None
        scored = setup, train.stage, sampling.temperature
        count = reinforce.minibatches * train.microbatches
        self._score = jit_score(*scored, count)
        self._score_entropy = jit_score(*scored, count, entropy=True)
        self._score_update = jit_score(*scored, train.microbatches, entropy=True)
        self._step_signals = jit_step_signals(setup, algorithm)
        self._update_signals = jit_update_signals(setup, algorithm)
        self._step = jit_policy_step(
            setup, scheduled, algorithm, self.optimizer, sampling.temperature
        )
        self._reset = jit_reset(setup, self.optimizer)

    def __call__(
        self,
        state: TrainState,
        reference: Reference | None,
        batch: Batch,
        paid: Mapping[str, np.ndarray],
        step: int,
    ) -> tuple[TrainState, list[dict[str, Array]]]:
        """Learns from what a step has sampled.

        Args:
          state: donated, with the critic's where there is one.
          batch: of `rl.batches.rows`, on the devices.
          paid: of `rl.pay.Rewards.arrays`.
          step: its number, from 1 on.

        Returns:
          The next state, and the metrics of each update.
        """
        reinforce, critic_state = self._reinforce, None
        if isinstance(state, StateWithCritic):
            state, critic_state = state.policy, state.critic
        batch = batch | self._compared(state, critic_state, reference, batch)
        with self._parts("adv"):
            batch |= self._parts.until(self._step_signals(batch, paid))
            if step <= reinforce.critic_warmup_steps:
                batch["advantages"] = jnp.zeros_like(batch["advantages"])
        every = reinforce.reset_optimizer_every
        if every and (step - 1) % every == 0:
            state = state.with_learnt(self._reset(state.learnt))
        measured = []
        with self._parts("update_actor"):
            cut = minibatches(self.setup, batch, reinforce, seed=self._seed, step=step)
            for number, part in enumerate(cut):
                part = left_policy(part) if number else part
                part = part | self._singled_out(state, part, step, number)
                values = {}
                if self.critic is not None and critic_state is not None:
                    with self._parts("update_critic"):
                        updated = self.critic.update(critic_state, part)
                        critic_state, values = self._parts.until(updated)
                # Each update is waited for: the critic's next one would have its seconds.
                state, of_policy = self._parts.until(self._step(state, part))
                measured.append(of_policy | values)
        return StateWithCritic.of(state, critic_state) if critic_state else state, measured

    def _compared(
        self,
        state: TrainState,
        critic_state: TrainState | None,
        reference: Reference | None,
        batch: Batch,
    ) -> Batch:
        """Returns what the algorithm compares with, before anything has been learnt."""
        needs, reinforce = self._algorithm.needs, self._reinforce
        updates = reinforce.epochs * reinforce.minibatches
        compared = compared_logprobs(
            self._score,
            state.variables,
            reference.variables if reference else None,
            batch,
            reinforce.old_logprobs,
            updates,
            needs,
            self._parts,
        )
        if "entropy" in needs:
            with self._parts("old_log_prob"):
                scored = self._parts.until(self._score_entropy(state.variables, batch))
                _, compared["old_entropy"] = scored
        if self.critic is not None:
            assert critic_state is not None
            with self._parts("values"):
                scored = self._parts.until(self.critic.score(critic_state.variables, batch))
                compared["old_values"] = scored
        return compared

    def _singled_out(self, state: TrainState, batch: Batch, step: int, number: int) -> Batch:
        """Returns what the algorithm singles out of the tokens of an update."""
        if self._algorithm.selection is None:
            return {}
        logprobs_BT, entropy_BT = self._score_update(state.variables, batch)
        current = {"current_logprobs": logprobs_BT, "current_entropy": entropy_BT}
        seed = np.random.SeedSequence((self._seed, step, number)).generate_state(1)[0]
        return self._update_signals(batch | current, jax.random.key(seed))


def per_update(train: TrainConfig, updates: int) -> TrainConfig:
    """Returns the config of the optimizer, which counts updates where `train` counts steps.

    The MTP modules take no part in reinforcement, so nothing may decay them.
    """
    cosine = train.cosine_steps if train.cosine_steps == -1 else train.cosine_steps * updates
    return dataclasses.replace(
        train,
        mtp_weight=0.0,
        steps=train.steps * updates,
        warmup_steps=train.warmup_steps * updates,
        constant_steps=train.constant_steps * updates,
        cosine_steps=cosine,
    )


def jit_policy_step(
    setup: Setup,
    train: TrainConfig,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    temperature: float,
) -> Step:
    """Returns the jitted (state, batch) -> (state, metrics) that minimises the algorithm's loss."""
    objective = policy_objective(setup.model, train, algorithm, temperature)
    return jit_step(
        make_step(setup.model, train, objective, optimizer),
        abstract_run_state(setup.model, setup.lora, optimizer, setup.mesh),
        setup.mesh,
    )


def jit_reset(setup: Setup, optimizer: optax.GradientTransformation):
    """Returns the jitted state -> state whose optimizer has no moments yet; the state is donated.

    Its place in the schedule of the learning rate stays.
    """

    def is_schedule(x: object) -> bool:
        return isinstance(x, ScaleByScheduleState)

    def reset(state: TrainState) -> TrainState:
        fresh = optimizer.init(state.params)
        kept = jax.tree.map(
            lambda old, new: old if is_schedule(old) else new,
            state.opt_state,
            fresh,
            is_leaf=is_schedule,
        )
        return dataclasses.replace(state, opt_state=kept)

    shardings = state_shardings(abstract_learnt(setup.model, setup.lora, optimizer, setup.mesh))
    options = compiler_options(setup.mesh)
    return jax.jit(reset, donate_argnums=0, out_shardings=shardings, compiler_options=options)
