"""The training loop of reinforcement learning.

A step takes prompts, samples completions, rewards them, computes advantages, scores the tokens
under the policies that the algorithm compares with, and updates on minibatches.
"""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils

from checkpoints.training import Checkpoints
from data.tasks.problem import Problem
from model.config import ModelConfig
from model.record import routing_layers, selecting_layers
from model.sharding import batch_shards
from model.transformer import boxed_shapes
from rl.agreement import Agreement
from rl.algorithms import Algorithm, get_algorithm
from rl.batches import minibatches, rows, with_advantages
from rl.canary import Canary
from rl.compared import compared_logprobs, jit_score, left_policy
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.generate import Completion, Generator
from rl.objective import policy_objective
from rl.problems import problems_to_train, prompt_of
from rl.reasoning import ReasoningEvaluation
from rl.reference import start_with_reference
from rl.request import Counts
from rl.rewards import metric_name, total_reward
from rl.rollouts import Rollouts
from rl.traces import Traces
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.optimizer import make_optimizer
from train.progress import Progress
from train.rescue import SavedOnError
from train.restore import restored_or_new
from train.setup import Setup
from train.state import abstract_state
from train.step import Step, jit_step, make_step


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
    evaluate: EvaluateConfig,
    workdir: Path,
    *,
    template: str,
    init_from: str,
    seed: int,
) -> bool:
    """Trains until `train.steps` rollouts are learnt from or the process is asked to stop.

    Goes on from the newest checkpoint in `workdir`, with the problems, sampling keys and reference
    it would have had. `template` is `data.chat_template`; a new run's parameters come from
    `init_from`, or are drawn where that is "". Every train.eval_every steps, and after the last,
    held-out problems are evaluated as `evaluate` says; with 0 none are. Returns whether all steps
    are done.

    Raises:
      UserError: the task, a prompt or a checkpoint does not fit, or gradients are never finite.
    """
    if reinforce.indexer == "frozen":  # as what no loss reaches is, see `trainable`
        train = dataclasses.replace(train, indexer_weight=0.0)
    updates = reinforce.epochs * reinforce.minibatches
    algorithm = get_algorithm(
        reinforce.algorithm, max_completion=sampling.max_new_tokens, kl_weight=reinforce.kl_weight
    )
    parameters = boxed_shapes(setup.model)["params"]
    optimizer = make_optimizer(per_update(train, updates), parameters)
    tokenizer = setup.tokenizer
    problems = problems_to_train(reinforce.task, sampling, tokenizer, template, seed).problems
    group_size = reinforce.group_size
    most = reinforce.prompts_per_step * group_size
    made = records_made(setup.model, train.stage)
    kept = kept_records(made, sampling, reinforce)
    recorded = kept | (made if reinforce.agreement_rows else frozenset())
    generate = Generator(
        setup,
        sampling,
        template,
        completions=reinforce.in_flight * group_size,
        group_size=group_size,
        record=recorded,
    )
    agreement = Agreement(setup, train.stage, reinforce.agreement_rows)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    rollouts = Rollouts(generate, problems, reinforce, key, seed)
    canary = None
    if reinforce.canary_tolerance and sampling.attention_top_p == 1 and made <= recorded:
        canary = Canary(
            setup,
            generate.engine,
            prompt_of(problems[0], tokenizer, template),
            stage=train.stage,
            sampling=sampling,
            tolerance=reinforce.canary_tolerance,
        )
    held_out = None
    if train.eval_every:
        held_out = ReasoningEvaluation(setup, evaluate, reinforce, generate, seed)
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(workdir / "checkpoints", train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
    ):
        begin = {"init_from": init_from, "seed": seed}
        cursor = rollouts if reinforce.in_parts else None
        if algorithm.divergence is None:
            state, reference = restored_or_new(setup, optimizer, checkpoints, cursor, **begin), None
        else:
            state, reference = start_with_reference(
                setup, optimizer, checkpoints, workdir, cursor, **begin
            )
        done = int(state.step) // updates
        parts = reinforce.minibatches * train.microbatches
        score_fn = jit_score(setup, train.stage, sampling.temperature, parts)
        step_fn = jit_policy_step(
            setup, per_update(train, updates), algorithm, optimizer, sampling.temperature
        )
        with (
            Metrics(workdir, "reinforce", resume_step=done) as metrics,
            Traces(workdir, reinforce.trace_completions, tokenizer, resume_step=done) as traces,
            Progress(train.steps, workdir.resolve().name) as progress,
            SavedOnError(checkpoints) as newest,
        ):
            log = StepLog(train, metrics, progress)
            if done:
                progress.note(f"goes on from step {done}")
            progress.note("the first step compiles the sampler and the update")
            for step in range(done + 1, train.steps + 1):
                started = time.monotonic()
                before = dataclasses.replace(generate.engine.counts)
                groups = rollouts.take(step, state.variables)
                chosen = [group.problem for group in groups]
                completions = [each for group in groups for each in group.completions]
                counts = generate.engine.counts.since(before)
                rewards = reward(completions, chosen, reinforce)
                trajectories = [completion.trajectory for completion in completions]
                some = agreement.some(trajectories)
                some = rows(some, setup, sampling, made, most=agreement.most(most))
                agreed = agreement(state.variables, some)
                multiple = parts * batch_shards(setup.mesh) if reinforce.packing else None
                batch = rows(trajectories, setup, sampling, kept, most=most, multiple=multiple)
                batch = with_advantages(batch, completions, rewards.total_PG, algorithm, reinforce)
                if reinforce.in_parts:
                    batch["stale"] = batch["mask"] & (batch["versions"] < step - 1)
                batch = setup.whole_on_devices(batch)
                sampled = time.monotonic()
                batch |= compared_logprobs(
                    score_fn, state.variables, reference, batch, reinforce.old_logprobs, updates
                )
                measured = []
                for minibatch in minibatches(setup, batch, reinforce, seed=seed, step=step):
                    minibatch = left_policy(minibatch) if measured else minibatch
                    state, values = step_fn(state, minibatch)
                    measured.append(values)
                newest.is_at(step, state, rollouts.place() if reinforce.in_parts else None)
                observed = observe(completions, rewards, counts)
                observed |= agreement.metrics(agreed) | rollouts.metrics(step, groups)
                values = timed(over_updates(measured) | observed, started, sampled)
                if canary:
                    gap = canary.check(step, state.variables)
                    values["sampler/canary_gap"] = jnp.asarray(gap)
                log.record(step, values, int(observed["tokens"]))
                if Due(train).log(step):
                    traces.write(step, chosen, completions, rewards.total_PG.ravel().tolist())
                if held_out and (step % train.eval_every == 0 or step == train.steps):
                    log.validation(step, held_out.validation(state.variables))
                checkpoints.check()
                stopping = interrupt.stop_requested(step)
                if Due(train).save(step) or stopping:
                    rollouts.settle()
                    checkpoints.save(step, state, cursor)
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


def reward(
    completions: Sequence[Completion], problems: Sequence[Problem], config: ReinforceConfig
) -> Rewards:
    """Rewards P * G completions, of which row p * G + g answers problem p.

    Those that were cut before their stop token get 0 where reinforce.truncated says so. Every
    process computes them; those of the first count, should a reward of one's own draw lots.
    """
    totals, by_name = [], {name: [] for name in config.rewards}
    for row, completion in enumerate(completions):
        total, parts = 0.0, dict.fromkeys(config.rewards, 0.0)
        if config.truncated != "no_reward" or not completion.truncated:
            problem = problems[row // config.group_size]
            total, parts = total_reward(completion.text, problem, config.rewards)
        totals.append(total)
        for name, value in parts.items():
            by_name[name].append(value)
    total_PG = np.asarray(totals, np.float32).reshape(-1, config.group_size)
    if jax.process_count() > 1:
        total_PG = np.asarray(multihost_utils.broadcast_one_to_all(total_PG))
    return Rewards(total_PG, by_name)


def records_made(model: ModelConfig, stage: str) -> frozenset[str]:
    """Returns which of "routes" and "selected" the model's layers choose."""
    selects = stage == "sparse" and selecting_layers(model)
    return frozenset(["routes"] * bool(routing_layers(model)) + ["selected"] * bool(selects))


def kept_records(
    made: Collection[str], sampling: SamplingConfig, config: ReinforceConfig
) -> frozenset[str]:
    """Returns which of `rl.records.RECORDS` the trainer does again as the sampler did."""
    keeps = {"routes": config.keep_routing, "selected": config.keep_selection}
    support = config.keep_sampling_mask and sampling.restricts
    return frozenset([name for name in made if keeps[name]] + ["support"] * support)


def over_updates(measured: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Returns the metrics of a rollout from those of its updates: means over them.

    The gap between the log-probs of trainer and sampler is that of the first update, when both have
    the same parameters. Counters and the learning rate are those after the last.
    """
    if len(measured) == 1:
        return dict(measured[0])
    means = {
        name: jnp.mean(jnp.stack([values[name] for values in measured]), axis=0)
        for name in measured[0]
    }
    before = {name: measured[0][name] for name in means if name.startswith("sampler/")}
    after = {name: measured[-1][name] for name in ("learning_rate", "skipped", "skipped_in_row")}
    return means | before | after


def observe(
    completions: Sequence[Completion], rewards: Rewards, counts: Counts
) -> dict[str, float | np.number]:
    """Returns the metrics of what was sampled, "tokens" among them.

    Where MTP modules draft, those of the drafts: the share that was taken, and tokens a pass.
    """
    drafts = {}
    if counts.drafted:
        drafts["sampler/drafts_accepted"] = counts.accepted / counts.drafted
        drafts["sampler/tokens_per_pass"] = (counts.passes + counts.accepted) / counts.passes
    lengths_B = np.asarray([completion.length for completion in completions])
    return {
        "reward": rewards.total_PG.mean(),
        **{metric_name(name): np.mean(values) for name, values in rewards.by_name.items()},
        "completion_length": lengths_B.mean(),
        "truncated": np.mean([completion.truncated for completion in completions]),
        "zero_variance_groups": np.mean(np.ptp(rewards.total_PG, axis=1) == 0),
        "tokens": lengths_B.sum(),
        **drafts,
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
