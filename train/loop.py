"""The training loop of a language model, on text, on conversations or on pairs of them.

It reads from top to bottom: data, objective, state and restore, step, loop.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import optax

from checkpoints.cursors import Place
from checkpoints.training import Checkpoints
from data.config import DataConfig
from train.base import abstract_run_state
from train.config import TrainConfig
from train.evaluate import validation_means, was_evaluated
from train.interrupt import Interrupt
from train.lora import learnt_shapes
from train.metrics import Metrics
from train.monitor import Due, StepLog
from train.objective import Objective, language_objective
from train.optimizer import make_optimizer
from train.preference_objective import preference_objective, scored_by_reference
from train.preferences import Preference
from train.progress import Progress, timed_line
from train.reference import begun
from train.rescue import SavedOnError
from train.restore import Branch
from train.setup import Setup, open_batches
from train.step import abstract_batch, jit_evaluation, jit_step, make_step


def train_language_model(
    setup: Setup,
    train: TrainConfig,
    data: DataConfig,
    workdir: Path,
    *,
    phase: str,
    chat: bool,
    init_from: str,
    seed: int,
    branch: Branch | None = None,
    preference: Preference | None = None,
) -> bool:
    """Trains until `train.steps` steps are done or the process is asked to stop.

    Goes on from the newest checkpoint in `workdir`, with its data cursor, to the bit.

    Args:
      workdir: where checkpoints/, metrics.jsonl and tensorboard/ are.
      phase: "pretrain" or "finetune", the name of the metrics.
      chat: whether the documents are conversations, of which only the assistant's words are
        targets.
      init_from: where a new run's parameters come from; "" draws them.
      seed: of the parameters and of the order of the data.
      branch: a new run takes all of the state of `init_from`, not its parameters alone. None where
        the loss compares with a reference.
      preference: the loss over the pairs that the conversations are; None predicts the next token.

    Returns:
      Whether all steps are done.

    Raises:
      UserError: the data or a checkpoint does not fit, or gradients stay without finite values.
        After the first step this and every other error saves the steps done.
    """
    if preference:  # MTP modules learn nothing from pairs: frozen, decay does not wear them away
        train = dataclasses.replace(train, mtp_weight=0.0)
    setup = setup.learning(train)
    stream = open_batches(setup, data, "train", seed=seed, chat=chat)
    objective = language_objective(setup.model, train)
    if preference:
        objective = preference_objective(setup.model, train, preference)
    compares = preference is not None and preference.needs_reference
    optimizer = make_optimizer(train, learnt_shapes(setup.model, setup.lora)["params"])
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(workdir / "checkpoints", train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
    ):
        resumes = checkpoints.latest() is not None
        new = not resumes and not init_from
        compile_step = functools.partial(compiled_step, setup, train, data, objective, optimizer)
        with timed_line("making the state and compiling the step"):
            with ThreadPoolExecutor(max_workers=1) as background:
                # The step compiles while a new state is made: on two cores the first step comes
                # seconds sooner.
                program = background.submit(compile_step) if new else None
                state, reference = begun(
                    setup,
                    optimizer,
                    checkpoints,
                    stream,
                    needs_reference=compares,
                    init_from=init_from,
                    seed=seed,
                    branch=branch,
                )
            done = int(state.step)
            if done < train.steps:
                step_fn = program.result() if program else compile_step()
        scored = scored_by_reference(setup, train, reference)
        evaluate_fn = jit_evaluation(objective, setup.mesh)
        tokens = data.batch_size * data.seq_len
        due = Due(train)
        with (
            Metrics(workdir, phase, resume_step=done, sinks=train.sinks) as metrics,
            Progress(train.steps, workdir.resolve().name) as progress,
            SavedOnError(checkpoints) as newest,
        ):
            log = StepLog(train, metrics, progress)
            if resumes and done:
                progress.note(f"goes on from step {done}")

            def evaluate(step: int) -> None:
                means = validation_means(
                    setup,
                    lambda variables, batch: evaluate_fn(variables, scored(batch)),
                    state.variables,
                    data,
                    train.eval_batches,
                    chat=chat,
                    loss=objective.loss if preference else None,
                )
                log.validation(step, means)

            # Where an error in it ended the run, which one process alone saves (train/rescue.py).
            alone = resumes and jax.process_count() == 1
            if alone and due.evaluation(done) and not was_evaluated(metrics.path, phase, done):
                evaluate(done)
            # (step, metrics) still on the device: reading them a step late never blocks
            unread = None
            for step in range(done + 1, train.steps + 1):
                try:
                    batch = scored(setup.on_devices(next(stream)))
                except Exception:  # a bad record, say
                    if unread:
                        log.record(*unread, tokens)
                    raise
                state, values = step_fn(state, batch)
                newest.is_at(step, state.learnt, Place.of(stream))
                for bad_record in stream.news():
                    print(f"skipped {bad_record}", file=sys.stderr, flush=True)
                if unread:
                    log.record(*unread, tokens)
                unread = (step, values | stream.metrics())
                if due.evaluation(step):
                    log.record(*unread, tokens)
                    unread = None
                    evaluate(step)
                checkpoints.check()
                stopping = interrupt.stop_requested(step)
                if due.save(step) or stopping:
                    checkpoints.save(step, state.learnt, stream)
                if stopping:
                    break
            if unread:
                log.record(*unread, tokens)
        return int(state.step) >= train.steps


def compiled_step(
    setup: Setup,
    train: TrainConfig,
    data: DataConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> Callable:
    """Compiles the step for this mesh and these shapes, and no others.

    The state comes in, and goes out, as `abstract_state` lays it out.
    """
    step = make_step(setup.model, train, objective, optimizer)
    with jax.set_mesh(setup.mesh):  # a thread does not inherit the mesh
        state = abstract_run_state(setup.model, setup.lora, optimizer, setup.mesh)
        batch = abstract_batch(data.batch_size, data.seq_len, setup.mesh, objective.reads)
        return jit_step(step, state, setup.mesh).lower(state, batch).compile()
