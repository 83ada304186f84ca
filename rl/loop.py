"""The training loop of reinforcement learning.

A step takes groups of completions that have been paid, lays them out in rows, and learns from them:
rl/sampler.py says how they are sampled, rl/learner.py how they are learnt from.
"""

import dataclasses
from pathlib import Path

import jax

from checkpoints.training import Checkpoints
from rl.agreement import Agreement
from rl.ahead import Ahead
from rl.algorithms.row import Algorithm
from rl.algorithms.spec import get_algorithm
from rl.batches import Layout
from rl.clock import Parts
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.learner import Learner
from rl.measure import as_arrays, observe, over_updates, speeds
from rl.pass_rates import PassRates
from rl.records import kept_records, records_made
from rl.reference import begun
from rl.sampler import Sampler
from rl.servers.connect import connect
from rl.traces import Traces
from rl.weights import Weights
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.progress import Progress
from train.rescue import SavedOnError
from train.setup import Setup


def train_policy(
    setup: Setup,
    sampler_setup: Setup,
    train: TrainConfig,
    sampling: SamplingConfig,
    reinforce: ReinforceConfig,
    evaluate: EvaluateConfig,
    workdir: Path,
    *,
    template: str,
    init_from: str,
    seed: int,
    pass_rates: PassRates | None = None,
) -> bool:
    """Trains until `train.steps` rollouts are learnt from or the process is asked to stop.

    Goes on from the newest checkpoint in `workdir`, with the problems, sampling keys and reference
    it would have had. Every train.eval_every steps, and after the last, held-out problems are
    evaluated as `evaluate` says; with 0 none are.

    Args:
      sampler_setup: of the devices that sample: `setup` itself where sampling and learning take
        turns on all of them.
      template: `data.chat_template`.
      init_from: where a new run's parameters come from; "" draws them.
      pass_rates: tries of the problems before the run, `reinforce.pass_rates_from`.

    Returns:
      Whether all steps are done.

    Raises:
      UserError: the task, a prompt or a checkpoint does not fit, or gradients are never finite.
    """
    algorithm = get_algorithm(
        reinforce.algorithm, max_completion=sampling.most_sampled, kl_weight=reinforce.kl_weight
    )
    reinforce = dataclasses.replace(reinforce, **algorithm.loop)
    check_algorithm(algorithm, reinforce)
    if reinforce.indexer == "frozen":  # as what no loss reaches is, see `trainable`
        train = dataclasses.replace(train, indexer_weight=0.0)
    updates = reinforce.epochs * reinforce.minibatches
    made = records_made(setup.model, train.stage)
    kept = kept_records(made, sampling, reinforce)
    cuts = reinforce.minibatches * train.microbatches
    layout = Layout(setup, sampling, reinforce, made, kept, cuts)
    agreement = Agreement(setup, train.stage, reinforce.agreement_rows)
    parts = Parts()
    learn = Learner(setup, train, sampling, reinforce, algorithm, seed, parts)
    sections = train, sampling, reinforce, evaluate
    corrected = corrects(algorithm, reinforce)
    server = connect(setup, sampling, reinforce, workdir, template, corrects=corrected)
    sampler = Sampler(
        sampler_setup,
        *sections,
        algorithm,
        template=template,
        seed=seed,
        server=server,
        pass_rates=pass_rates,
    )
    weights = None
    if sampler_setup is not setup or (server and reinforce.lag):  # who samples has time of its own
        checked = reinforce.canary_tolerance != 0
        mesh, lora = sampler_setup.mesh, learn.setup.lora
        weights = Weights(setup.model, mesh, checked=checked, lora=lora)
    ahead = Ahead(sampler, reinforce.lag, weights, parts)
    cursor = ahead if reinforce.remembers else None
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(workdir / "checkpoints", train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
        ahead,
        begun(
            learn.setup,
            learn.optimizer,
            checkpoints,
            workdir,
            cursor,
            learn.critic,
            train,
            reinforce,
            needs_reference="reference" in algorithm.needs,
            init_from=init_from,
            seed=seed,
        ) as (state, reference),
    ):
        done = int(state.step) // updates
        with (
            Metrics(workdir, "reinforce", resume_step=done, sinks=train.sinks) as metrics,
            Traces(
                workdir, reinforce.trace_completions, setup.tokenizer, resume_step=done
            ) as traces,
            Progress(train.steps, workdir.resolve().name) as progress,
            SavedOnError(checkpoints) as newest,
        ):
            log = StepLog(train, metrics, progress)
            if done:
                progress.note(f"goes on from step {done}")
            progress.note("the first step compiles the sampler and the update")
            for step in range(done + 1, train.steps + 1):
                parts.begin()
                sampled = ahead.take(step, state.variables)
                trajectories = [each.trajectory for each in sampled.completions]
                with parts("agreement"):
                    some = agreement.some(trajectories)
                    recorded = layout.recorded(some, agreement.most(layout.most))
                    agreed = agreement.metrics(agreement(state.variables, recorded))
                with parts("rows"):
                    batch = parts.until(layout(sampled.completions, step))
                paid = sampled.rewards.arrays(layout.most, sampled.greedy_P)
                state, measured = learn(state, reference, batch, paid, step)
                newest.is_at(step, state.learnt, ahead.place() if cursor else None)
                if reference:
                    reference.after(step, state.variables)
                values = over_updates(measured) | sampled.metrics | agreed
                values |= observe([*sampled.groups, *sampled.left_out], sampled.counts)
                if reinforce.in_parts or reinforce.lag:
                    values |= ahead.metrics(step, sampled)
                values |= parts.collect()
                learnt = reinforce.epochs * sum(len(each.tokens_T) for each in trajectories)
                values |= speeds(values, sampled.counts.sampled, learnt)
                log.record(step, as_arrays(values), int(values["tokens"]))
                if Due(train).log(step):
                    traces.write(step, sampled.groups)
                if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
                    with parts("testing"):
                        found = ahead.validation(step, state.variables)
                    log.validation(step, found | parts.collect("testing"))
                checkpoints.check()
                stopping = interrupt.stop_requested(step)
                if Due(train).save(step) or stopping:
                    with parts("save_checkpoint"):
                        ahead.settle()
                        checkpoints.save(step, state.learnt, cursor)
                    metrics.write(step, parts.collect("save_checkpoint"))
                if stopping:
                    break
        return int(state.step) >= train.steps * updates


def check_algorithm(algorithm: Algorithm, reinforce: ReinforceConfig) -> None:
    """Raises UserError where a field does not fit the algorithm, and warns of a lag that may not.

    Args:
      reinforce: with the fields that the algorithm sets.
    """
    reinforce.check_algorithm(algorithm.needs)
    if reinforce.lag and not corrects(algorithm, reinforce) and jax.process_index() == 0:
        print(
            f"warning: reinforce.lag = {reinforce.lag}: {algorithm.name} does not correct for the "
            "age of its samples; add correction=token_truncate",
            flush=True,
        )


def corrects(algorithm: Algorithm, reinforce: ReinforceConfig) -> bool:
    """Returns whether an algorithm weighs a token by how likely its sampler was to draw it.

    Either its ratio is taken to the sampler's log-probs, or it has a correction for them.
    """
    functions = algorithm.surrogate, algorithm.ratio
    ignored = any(getattr(function, "ignores_sampler", False) for function in functions)
    compared = reinforce.old_logprobs == "sampler" and not ignored
    return compared or bool(algorithm.options.correction)
