"""Reinforcement learning on verifiable tasks: GRPO, Dr.GRPO and the other rows of rl/algorithms.py.

    python -m launch.reinforce --config=configs/quickstart.py:reinforce --workdir=runs/rl
    --config.init_from=runs/chat python -m launch.reinforce ... --config.reinforce.algorithm=grpo
    --config.reinforce.kl_weight=0.01

A step samples `reinforce.group_size` completions of `reinforce.prompts_per_step` prompts, rewards
them, and updates epochs x minibatches times; train.steps counts such steps. The same command again
goes on where the run stopped.
"""

import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from checkpoints.training import Checkpoints
from data.chat import encode_prompt
from data.pipeline import draw_problems
from data.tasks.problem import Problem
from errors import UserError
from experiment.command_line import command
from experiment.schema import Config
from experiment.setup import Setup, fresh_or_restored, load_variables, set_up, to_host
from experiment.workdir import open_workdir
from launch.pretrain import Due, report
from model.sharding import batch_sharding
from report.summary import stage_summary, write_summary
from rl.algorithms import Algorithm, get_algorithm
from rl.objective import logprobs_at_tokens, policy_objective
from rl.rewards import total_reward
from rl.rollout import pad_prompts, policy_batch
from rl.sampler import sample
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.optimizer import make_optimizer
from train.progress import Progress
from train.state import abstract_state
from train.step import jit_step, make_step

PROBLEMS = 4_096  # distinct training problems a run draws from


def run(config: Config, workdir: Path) -> bool:
    """Returns whether all steps are done."""
    check(config)
    with open_workdir(workdir, config, "reinforce"):
        return train(config, workdir)


def train(config: Config, workdir: Path) -> bool:
    r, updates = config.reinforce, config.reinforce.epochs * config.reinforce.minibatches
    begin = set_up(config, workdir, rows=r.prompts_per_step, trains=True)
    trained = per_update(config.train, updates)
    algorithm = get_algorithm(
        r.algorithm, max_completion=config.sampling.max_new_tokens, kl_weight=r.kl_weight
    )
    temperature = config.sampling.temperature
    optimizer = make_optimizer(trained)
    tasks = draw_problems(r.task, "train", PROBLEMS, seed=config.seed)

    with (
        jax.set_mesh(begin.mesh),
        Checkpoints(workdir / "checkpoints", config.train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
    ):
        state = fresh_or_restored(begin, optimizer, checkpoints)
        done = int(state.step) // updates
        reference = reference_variables(begin, algorithm, state)
        objective = policy_objective(begin.model, trained, algorithm, temperature)
        step_fn = jit_step(
            make_step(begin.model, trained, objective, optimizer),
            abstract_state(begin.model, optimizer, begin.mesh),
            begin.mesh,
        )
        score_fn = jax.jit(
            functools.partial(logprobs_at_tokens, begin.model, trained.stage, temperature)
        )
        sample_fn = sampler(begin, r.group_size)
        due = Due(config)
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        with (
            Metrics(workdir, "reinforce", resume_step=done) as metrics,
            Progress(config.train.steps, workdir.resolve().name) as progress,
        ):
            for step in range(done + 1, config.train.steps + 1):
                began = time.monotonic()
                chosen = prompts_of(step, tasks, config)
                batch, observed = rollout(
                    begin,
                    sample_fn,
                    state.variables,
                    chosen,
                    algorithm,
                    jax.random.fold_in(key, step),
                )
                sampled = time.monotonic()
                batch["old_logprobs"] = (
                    batch["sampler_logprobs"]
                    if r.old_logprobs == "sampler"
                    else score_fn(state.variables, batch)
                )
                if algorithm.divergence is not None:
                    batch["reference_logprobs"] = score_fn(reference, batch)
                for minibatch in minibatches(begin, batch, step):
                    state, values = step_fn(state, minibatch)
                values = {name: jnp.asarray(value) for name, value in (values | observed).items()}
                jax.block_until_ready(values)
                values |= {
                    "sample_seconds": jnp.asarray(sampled - began),
                    "update_seconds": jnp.asarray(time.monotonic() - sampled),
                }
                report(step, values, config, metrics, progress, int(observed["tokens"]))
                stopping = interrupt.stop_requested(step)
                if due.save(step) or stopping:
                    checkpoints.save(step, state)
                if stopping:
                    break
        finished = int(state.step) >= config.train.steps * updates
    write_summary(workdir, {"reinforce": stage_summary(config, workdir, "reinforce")})
    return finished


def check(config: Config) -> None:
    """What reinforcement needs of sections that are each right by themselves."""
    sparse = config.train.stage == "sparse"
    if config.train.stage == "warmup":
        raise UserError(
            "train.stage = 'warmup': trains the indexer alone; reinforce with 'dense' or 'sparse'"
        )
    if sparse != (config.sampling.attention == "sparse"):
        wanted = f"must be {config.train.stage!r}, as train.stage is: the trainer's policy must be the sampler's"
        raise UserError(f"sampling.attention = {config.sampling.attention!r}: {wanted}")
    if config.sampling.temperature == 0:
        raise UserError(
            "sampling.temperature = 0: all completions of a prompt would be the same and nothing could be learnt; use 1.0"
        )
    rows = (
        config.reinforce.prompts_per_step
        * config.reinforce.group_size
        // config.reinforce.minibatches
    )
    if rows % config.train.microbatches:
        raise UserError(
            f"train.microbatches = {config.train.microbatches}: does not divide the {rows} completions of an update"
        )


def per_update(train: TrainConfig, updates: int) -> TrainConfig:
    """The schedule counts optimizer updates where the config counts steps. The MTP modules take no
    part, so nothing may decay them.
    """
    return dataclasses.replace(
        train,
        mtp_weight=0.0,
        steps=train.steps * updates,
        warmup_steps=train.warmup_steps * updates,
        constant_steps=train.constant_steps * updates,
        cosine_steps=train.cosine_steps
        if train.cosine_steps == -1
        else train.cosine_steps * updates,
    )


def reference_variables(begin: Setup, algorithm: Algorithm, state) -> dict | None:
    """The policy RL started from, for the divergence: `init_from`, or the fresh parameters. None
    when no term needs it.
    """
    if algorithm.divergence is None:
        return None
    if begin.config.init_from:
        return load_variables(begin.model, begin.mesh, begin.config.init_from)
    return jax.tree.map(jnp.copy, state.variables)


def sampler(begin: Setup, group: int):
    """Jitted (variables, prompts_PT, segments_PT, key) -> Completions."""
    t = begin.tokenizer
    return jax.jit(
        functools.partial(sample, begin.model, begin.config.sampling, t.stops, t.pad, group=group)
    )


def prompts_of(step: int, tasks: list[Problem], config: Config) -> list[Problem]:
    """The problems of a step: a function of the step alone, so that a run resumes with the ones it
    would have had. Every epoch has its own order.
    """
    first = (step - 1) * config.reinforce.prompts_per_step
    found = []
    for position in range(first, first + config.reinforce.prompts_per_step):
        epoch, place = divmod(position, len(tasks))
        found.append(
            tasks[np.random.default_rng((config.seed, epoch)).permutation(len(tasks))[place]]
        )
    return found


def rollout(
    begin: Setup,
    sample_fn,
    variables: dict,
    chosen: list[Problem],
    algorithm: Algorithm,
    key: Array,
) -> tuple[dict[str, Array], dict[str, float]]:
    """Samples, rewards, and returns the batch to learn from and what was observed."""
    config, tokenizer, group = begin.config, begin.tokenizer, begin.config.reinforce.group_size
    prompts = encode_problems(begin, chosen)
    sharding = batch_sharding(begin.mesh)
    tokens_PT, segments_PT = (
        jax.device_put(x, sharding) for x in (prompts.tokens_PT, prompts.segments_PT)
    )
    completions = sample_fn(variables, tokens_PT, segments_PT, key)
    tokens_BC, mask_BC = to_host(completions.tokens_BC), to_host(completions.mask_BC)
    weights = {"answer": config.reinforce.answer_reward, "format": config.reinforce.format_reward}
    scored = [
        total_reward(text, chosen[row // group].answer, weights)
        for row, text in enumerate(texts(begin, tokens_BC, mask_BC))
    ]
    rewards_PG = np.asarray([reward for reward, _ in scored], np.float32).reshape(-1, group)
    batch = policy_batch(tokens_PT, segments_PT, completions, group)
    advantages_B = algorithm.advantage(jnp.asarray(rewards_PG)).reshape(-1)
    batch["advantages"] = jnp.where(batch["mask"], advantages_B[:, None], 0.0)
    lengths_B = mask_BC.sum(axis=1)
    stopped_B = np.isin(tokens_BC[np.arange(len(lengths_B)), lengths_B - 1], tokenizer.stops)
    observed = {
        "reward": rewards_PG.mean(),
        "answer_reward": np.mean([parts["answer"] for _, parts in scored]),
        "format_reward": np.mean([parts["format"] for _, parts in scored]),
        "completion_length": lengths_B.mean(),
        "truncated": 1 - stopped_B.mean(),
        "zero_variance_groups": np.mean(np.ptp(rewards_PG, axis=1) == 0),
        "tokens": lengths_B.sum(),
    }
    return batch, observed


def encode_problems(begin: Setup, chosen: list[Problem]):
    template = begin.config.data.chat_template
    ids = [
        encode_prompt([{"role": "user", "content": problem.question}], begin.tokenizer, template)
        for problem in chosen
    ]
    return pad_prompts(ids, begin.config.sampling.max_prompt_tokens, begin.tokenizer.pad)


def texts(begin: Setup, tokens_BC: np.ndarray, mask_BC: np.ndarray) -> list[str]:
    """Completions as text, tags included and the stop token not; with the <think> that some
    checkpoints' templates put at the end of the prompt.
    """
    tokenizer = begin.tokenizer
    cue = tokenizer.decode(
        encode_prompt(
            [{"role": "user", "content": "?"}], tokenizer, begin.config.data.chat_template
        ),
        skip_special_tokens=False,
    )
    opening = "<think>" if cue.rstrip().endswith("<think>") else ""
    rows = (
        [i for i in row[mask] if i not in tokenizer.stops]
        for row, mask in zip(tokens_BC, mask_BC, strict=True)
    )
    return [opening + tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def minibatches(begin: Setup, batch: dict[str, Array], step: int):
    """epochs x minibatches pieces of the rollout, each epoch in its own order; the whole as it is
    when there is one.
    """
    r = begin.config.reinforce
    rows = batch["tokens"].shape[0]
    sharding = batch_sharding(begin.mesh)
    for epoch in range(r.epochs):
        order = (
            np.random.default_rng((begin.config.seed, step, epoch)).permutation(rows)
            if r.minibatches > 1
            else np.arange(rows)
        )
        for part in np.split(order, r.minibatches):
            yield (
                batch
                if r.minibatches == 1
                else {name: jax.device_put(x[part], sharding) for name, x in batch.items()}
            )


if __name__ == "__main__":
    command(run)
