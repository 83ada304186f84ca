"""The training loop of reinforcement learning.

A step takes prompts, samples completions, rewards them, computes advantages, scores the tokens
under the policies that the algorithm compares with, and updates on minibatches.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from checkpoints.training import Checkpoints
from data.tasks.draw import draw_problems
from data.tasks.problem import Problem
from model.sharding import batch_sharding
from model.transformer import boxed_shapes
from rl.algorithms import Algorithm, get_algorithm
from rl.config import ReinforceConfig, SamplingConfig
from rl.generate import Generation, Generator
from rl.objective import logprobs_at_tokens, policy_objective
from rl.rewards import total_reward
from rl.rollout import policy_batch
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.optimizer import make_optimizer
from train.progress import Progress
from train.restore import load_variables, restored_or_new
from train.setup import Setup
from train.state import TrainState, abstract_state
from train.step import Step, jit_step, make_step

PROBLEMS = 4_096  # distinct training problems that a run draws from


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The rewards of P * G completions.

    Attributes:
      total_PG: float32, the weighted sum of the named rewards.
      by_name: reward name -> the unweighted reward of each completion, P * G of them.
    """

    total_PG: np.ndarray
    by_name: dict[str, list[float]]


def train_policy(
    setup: Setup,
    train: TrainConfig,
    sampling: SamplingConfig,
    reinforce: ReinforceConfig,
    workdir: Path,
    *,
    template: str,
    init_from: str,
    seed: int,
) -> bool:
    """Trains until `train.steps` rollouts are learnt from or the process is asked to stop.

    Goes on from the newest checkpoint in `workdir`, with the problems and sampling keys it would
    have had. `template` is `data.chat_template`; a new run's parameters come from `init_from`, or
    are drawn where that is "". Returns whether all steps are done.

    Raises:
      UserError: the task, a prompt or a checkpoint does not fit, or gradients are never finite.
    """
    updates = reinforce.epochs * reinforce.minibatches
    algorithm = get_algorithm(
        reinforce.algorithm, max_completion=sampling.max_new_tokens, kl_weight=reinforce.kl_weight
    )
    parameters = boxed_shapes(setup.model)["params"]
    optimizer = make_optimizer(per_update(train, updates), parameters)
    problems = draw_problems(reinforce.task, "train", PROBLEMS, seed=seed)
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(workdir / "checkpoints", train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
    ):
        state = restored_or_new(setup, optimizer, checkpoints, init_from=init_from, seed=seed)
        done = int(state.step) // updates
        reference = reference_variables(setup, algorithm, state, init_from)
        generate = Generator(setup, sampling, template, reinforce.group_size)
        score_fn = jit_score(setup, train.stage, sampling.temperature)
        step_fn = jit_policy_step(
            setup, per_update(train, updates), algorithm, optimizer, sampling.temperature
        )
        key = jax.random.fold_in(jax.random.key(seed), 1)
        with (
            Metrics(workdir, "reinforce", resume_step=done) as metrics,
            Progress(train.steps, workdir.resolve().name) as progress,
        ):
            log = StepLog(train, metrics, progress)
            for step in range(done + 1, train.steps + 1):
                started = time.monotonic()
                chosen = problems_of_step(step, problems, reinforce.prompts_per_step, seed)
                generation = generate(state.variables, chosen, jax.random.fold_in(key, step))
                rewards = reward(generation.texts, chosen, reinforce)
                batch = learning_batch(generation, rewards, algorithm, reinforce.group_size)
                sampled = time.monotonic()
                batch |= compared_logprobs(
                    score_fn, state.variables, reference, batch, reinforce.old_logprobs
                )
                for minibatch in minibatches(setup, batch, reinforce, seed=seed, step=step):
                    state, values = step_fn(state, minibatch)
                observed = observe(generation, rewards, setup.tokenizer.stops)
                values = timed(values | observed, started, sampled)
                log.record(step, values, int(observed["tokens"]))
                checkpoints.check()
                stopping = interrupt.stop_requested(step)
                if Due(train).save(step) or stopping:
                    checkpoints.save(step, state)
                if stopping:
                    break
        return int(state.step) >= train.steps * updates


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


def reference_variables(
    setup: Setup, algorithm: Algorithm, state: TrainState, init_from: str
) -> dict | None:
    """Returns the parameters that the divergence compares with.

    They are those of `init_from`, or a copy of those in `state`; None where the algorithm has no
    divergence.
    """
    if algorithm.divergence is None:
        return None
    if init_from:
        return load_variables(setup.model, setup.mesh, init_from)
    return jax.tree.map(jnp.copy, state.variables)


def jit_score(setup: Setup, stage: str, temperature: float) -> Callable[..., Array]:
    """Returns the jitted (variables, batch) -> log-probs [B, T] of the tokens of the mask."""
    return jax.jit(functools.partial(logprobs_at_tokens, setup.model, stage, temperature))


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
        abstract_state(setup.model, optimizer, setup.mesh),
        setup.mesh,
    )


def problems_of_step(
    step: int, problems: Sequence[Problem], count: int, seed: int
) -> list[Problem]:
    """Returns the `count` problems of a step, each epoch in its own order.

    They depend on the step alone, so that a run resumes with the ones it would have had.
    """
    first = (step - 1) * count
    chosen = []
    for position in range(first, first + count):
        epoch, place = divmod(position, len(problems))
        order = np.random.default_rng((seed, epoch)).permutation(len(problems))
        chosen.append(problems[order[place]])
    return chosen


def reward(texts: Sequence[str], problems: Sequence[Problem], config: ReinforceConfig) -> Rewards:
    """Rewards P * G completions, of which row p * G + g answers problem p."""
    coefficients = {"answer": config.answer_reward, "format": config.format_reward}
    found = [
        total_reward(text, problems[row // config.group_size].answer, coefficients)
        for row, text in enumerate(texts)
    ]
    totals = np.asarray([total for total, _ in found], np.float32)
    by_name = {name: [parts[name] for _, parts in found] for name in coefficients}
    return Rewards(totals.reshape(-1, config.group_size), by_name)


def learning_batch(
    generation: Generation, rewards: Rewards, algorithm: Algorithm, group_size: int
) -> dict[str, Array]:
    """Returns the batch of `policy_batch` with "advantages" [B, T], 0 outside the mask."""
    batch = policy_batch(
        generation.prompts_PT, generation.segments_PT, generation.completions, group_size
    )
    advantages_B = algorithm.advantage(jnp.asarray(rewards.total_PG)).reshape(-1)
    return batch | {"advantages": jnp.where(batch["mask"], advantages_B[:, None], 0.0)}


def compared_logprobs(
    score_fn: Callable[..., Array],
    variables: dict,
    reference: dict | None,
    batch: dict[str, Array],
    old_logprobs: str,
) -> dict[str, Array]:
    """Returns the log-probs [B, T] that the loss compares the policy's with.

    "old_logprobs" are those the sampler recorded or those the trainer computes;
    "reference_logprobs" are there where there is a reference.
    """
    recorded = old_logprobs == "sampler"
    compared = {
        "old_logprobs": batch["sampler_logprobs"] if recorded else score_fn(variables, batch)
    }
    if reference is not None:
        compared["reference_logprobs"] = score_fn(reference, batch | compared)
    return compared


def minibatches(
    setup: Setup, batch: dict[str, Array], config: ReinforceConfig, *, seed: int, step: int
) -> Iterator[dict[str, Array]]:
    """Yields epochs x minibatches parts of the batch, each epoch in its own order.

    Where one part is all of the batch, it comes as it is.
    """
    rows = batch["tokens"].shape[0]
    sharding = batch_sharding(setup.mesh)
    for epoch in range(config.epochs):
        if config.minibatches == 1:
            yield batch
            continue
        order = np.random.default_rng((seed, step, epoch)).permutation(rows)
        for part in np.split(order, config.minibatches):
            yield {name: jax.device_put(x[part], sharding) for name, x in batch.items()}


def observe(
    generation: Generation, rewards: Rewards, stops: tuple[int, ...]
) -> dict[str, float | np.number]:
    """Returns the metrics of what was sampled, "tokens" among them."""
    lengths_B = generation.mask_BC.sum(axis=1)
    last_B = generation.tokens_BC[np.arange(len(lengths_B)), lengths_B - 1]
    return {
        "reward": rewards.total_PG.mean(),
        "answer_reward": np.mean(rewards.by_name["answer"]),
        "format_reward": np.mean(rewards.by_name["format"]),
        "completion_length": lengths_B.mean(),
        "truncated": 1 - np.isin(last_B, stops).mean(),
        "zero_variance_groups": np.mean(np.ptp(rewards.total_PG, axis=1) == 0),
        "tokens": lengths_B.sum(),
    }


def timed(values: Mapping[str, Any], started: float, sampled: float) -> dict[str, Array]:
    """Waits for the values of a step, and adds how long sampling and updating took, in seconds.

    Args:
      started, sampled: `time.monotonic()` at the beginning of the step and when it had sampled.
    """
    arrays = {name: jnp.asarray(value) for name, value in values.items()}
    jax.block_until_ready(arrays)
    return arrays | {
        "sample_seconds": jnp.asarray(sampled - started),
        "update_seconds": jnp.asarray(time.monotonic() - sampled),
    }
