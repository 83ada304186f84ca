"""The training loop of reinforcement learning.

A step takes groups of completions, rewards them, lays them out in rows, and learns from them:
rl/learner.py says how.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from checkpoints.training import Checkpoints
from data.tasks.problem import Problem
from model.config import ModelConfig
from model.record import routing_layers, selecting_layers
from model.sharding import batch_shards
from model.transformer import boxed_shapes
from rl.agreement import Agreement
from rl.ahead import Ahead
from rl.algorithms.row import Algorithm
from rl.algorithms.spec import get_algorithm
from rl.batches import learnt_from, rows, with_ages
from rl.canary import Canary
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.critic import Critic
from rl.curriculum import Curriculum
from rl.generate import Completion, Generator
from rl.learner import Learner, per_update
from rl.measure import observe, over_updates, timed
from rl.pay import Rewards, paid_weights, reward, solved
from rl.problems import problems_to_train, prompt_of
from rl.reasoning import ReasoningEvaluation
from rl.reference import begun
from rl.rollouts import Group, Rollouts
from rl.traces import Traces
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.optimizer import make_optimizer
from train.progress import Progress
from train.rescue import SavedOnError
from train.setup import Setup


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
    algorithm = get_algorithm(
        reinforce.algorithm, max_completion=sampling.max_new_tokens, kl_weight=reinforce.kl_weight
    )
    reinforce = dataclasses.replace(reinforce, **algorithm.loop)
    reinforce.check_algorithm(algorithm.needs)
    if reinforce.lag and not corrects(algorithm, reinforce) and jax.process_index() == 0:
        print(
            f"warning: reinforce.lag = {reinforce.lag}: {algorithm.name} does not correct for the "
            "age of its samples; add correction=token_truncate",
            flush=True,
        )
    if reinforce.indexer == "frozen":  # as what no loss reaches is, see `trainable`
        train = dataclasses.replace(train, indexer_weight=0.0)
    updates = reinforce.epochs * reinforce.minibatches
    scheduled = per_update(train, updates)
    optimizer = make_optimizer(scheduled, boxed_shapes(setup.model)["params"])
    critic = Critic(setup, scheduled, reinforce) if "values" in algorithm.needs else None
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
    greedy = None
    if "greedy" in algorithm.needs:
        greedy = greedy_generator(setup, sampling, template, reinforce.prompts_per_step)
    agreement = Agreement(setup, train.stage, reinforce.agreement_rows)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    options, longest = algorithm.options, sampling.max_new_tokens
    weights = paid_weights(reinforce, evaluate)

    def pay(problem: Problem, completions: Sequence[Completion]) -> Rewards:
        return reward(completions, [problem], weights, reinforce.truncated, options, longest)

    curriculum = Curriculum(problems, reinforce, train.steps * reinforce.prompts_per_step, seed)
    solves = functools.partial(solved, evaluate=evaluate)
    given = generate, problems, curriculum, reinforce, pay, solves, key
    rollouts = Ahead(Rollouts(*given), reinforce.lag)
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
    learn = Learner(setup, train, sampling, reinforce, algorithm, optimizer, critic, seed)
    parts = reinforce.minibatches * train.microbatches
    multiple = parts * batch_shards(setup.mesh) if reinforce.packing else None
    cursor = rollouts if reinforce.remembers else None
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(workdir / "checkpoints", train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
        begun(
            setup,
            optimizer,
            checkpoints,
            workdir,
            cursor,
            critic,
            reinforce,
            needs_reference="reference" in algorithm.needs,
            references=references_kept(train, reinforce.reference_every),
            init_from=init_from,
            seed=seed,
        ) as (state, reference),
    ):
        done = int(state.step) // updates
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
                taken = rollouts.take(step, state.variables)
                groups, everything = taken.groups, [*taken.groups, *taken.left_out]
                completions = [each for group in groups for each in group.completions]
                counts = generate.engine.counts.since(before)
                rewards = Rewards.joined([group.rewards for group in groups])
                best = greedy_rewards(greedy, state.variables, groups, key, pay) if greedy else None
                trajectories = [completion.trajectory for completion in completions]
                some = agreement.some(trajectories)
                some = rows(some, setup, sampling, made, most=agreement.most(most))
                agreed = agreement(state.variables, some)
                batch = rows(trajectories, setup, sampling, kept, most=most, multiple=multiple)
                batch = learnt_from(batch, completions, reinforce.truncated)
                if reinforce.in_parts or reinforce.lag:
                    batch = with_ages(batch, step, reinforce.most_stale)
                batch = setup.whole_on_devices(batch)
                sampled = time.monotonic()
                paid = rewards.arrays(most, best)
                state, measured = learn(state, reference, batch, paid, step)
                newest.is_at(step, state, rollouts.place() if cursor else None)
                if reference:
                    reference.after(step, state.variables)
                observed = observe(everything, counts)
                observed |= agreement.metrics(agreed) | rollouts.metrics(step, taken)
                values = timed(over_updates(measured) | observed, started, sampled)
                if canary:
                    gap = canary.check(step, state.variables)
                    values["sampler/canary_gap"] = jnp.asarray(gap)
                log.record(step, values, int(observed["tokens"]))
                if Due(train).log(step):
                    problems_of = [group.problem for group in groups]
                    traces.write(step, problems_of, completions, rewards.total_PG.ravel().tolist())
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


def corrects(algorithm: Algorithm, reinforce: ReinforceConfig) -> bool:
    """Returns whether an algorithm weighs a token by how likely its sampler was to draw it.

    Either its ratio is taken to the sampler's log-probs, or it has a correction for them.
    """
    functions = algorithm.surrogate, algorithm.ratio
    ignored = any(getattr(function, "ignores_sampler", False) for function in functions)
    compared = reinforce.old_logprobs == "sampler" and not ignored
    return compared or bool(algorithm.options.correction)


def greedy_generator(
    setup: Setup, sampling: SamplingConfig, template: str, prompts: int
) -> Generator:
    """Returns what makes the greedy completion of each prompt of a step."""
    greedy = dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
    return Generator(setup, greedy, template, completions=prompts, group_size=1)


def greedy_rewards(
    greedy: Generator,
    variables: dict,
    groups: Sequence[Group],
    key: Array,
    pay: Callable[[Problem, Sequence[Completion]], Rewards],
) -> np.ndarray:
    """Returns what the greedy completion of each group's problem earns in all, float32 [P]."""
    problems = [group.problem for group in groups]
    found = dict(greedy.groups(variables, problems, key, range(len(problems)), 1))
    paid = [pay(problem, found[place]) for place, problem in enumerate(problems)]
    return Rewards.joined(paid).total_PG[:, 0]


def references_kept(train: TrainConfig, every: int) -> int:
    """Returns how many references a run keeps, so that each of its checkpoints has its own."""
    if not every:
        return 1
    return math.ceil((train.max_to_keep + 1) * train.save_every / every) + 2


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
