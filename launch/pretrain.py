"""Pretrains with fill-in-the-middle, trains the sparse indexer, or goes on with what another run
left.

    python -m launch.pretrain --config=configs/quickstart.py:pretrain --workdir=runs/mine python -m
    launch.pretrain --config=configs/base.py --workdir=runs/mine
    --config.data.sources="('text:src/**/*.py',)" --config.train.steps=5000 python -m
    launch.pretrain --config=configs/base.py --workdir=runs/indexer --config.init_from=runs/mine
    --config.train.stage=warmup

The same command again goes on where the run stopped. SIGTERM or Ctrl-C saves and ends it.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import optax

from checkpoints.training import Checkpoints
from data.pipeline import batches
from errors import UserError
from experiment.command_line import command
from experiment.schema import Config
from experiment.setup import Setup, fresh_or_restored, set_up
from experiment.workdir import open_workdir
from report.summary import stage_summary, write_summary
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.progress import Progress
from train.state import abstract_state
from train.step import Step, abstract_batch, jit_step, make_evaluation, make_step

SHOWN = (
    "lm",
    "indexer_kl",
    "reward",
    "completion_length",
    "entropy",
)  # on the progress line, those a stage has


def run(config: Config, workdir: Path) -> bool:
    """Returns whether the run is done (and not stopped before its end)."""
    with open_workdir(workdir, config, "pretrain"):
        return train(config, workdir, stage="pretrain")


def train(config: Config, workdir: Path, stage: str, chat: bool = False) -> bool:
    """Trains on text, or on conversations; `stage` names the metrics. Returns whether all steps are
    done.
    """
    begin = set_up(
        config, workdir, rows=config.data.batch_size // config.train.microbatches, trains=True
    )
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    stream = iter(
        batches(config.data, begin.tokenizer, split="train", seed=config.seed, chat=chat, **process)
    )
    objective = language_objective(begin.model, config.train)
    optimizer = make_optimizer(config.train)

    with (
        jax.set_mesh(begin.mesh),
        Checkpoints(workdir / "checkpoints", config.train.max_to_keep) as checkpoints,
        Interrupt() as interrupt,
    ):
        untrained = checkpoints.latest() is None and not config.init_from
        compile_step = functools.partial(
            compiled, begin, make_step(begin.model, config.train, objective, optimizer), optimizer
        )
        with ThreadPoolExecutor(max_workers=1) as aside:
            program = (
                aside.submit(compile_step) if untrained else None
            )  # while the state is made: on two cores the first step comes seconds sooner
            state = fresh_or_restored(begin, optimizer, checkpoints, stream)
        done = int(state.step)
        if done < config.train.steps:
            step_fn = program.result() if program else compile_step()
        evaluate_fn = jax.jit(make_evaluation(objective))
        tokens = config.data.batch_size * config.data.seq_len
        due = Due(config)
        with (
            Metrics(workdir, stage, resume_step=done) as metrics,
            Progress(config.train.steps, workdir.resolve().name) as progress,
        ):
            previous = (
                None  # (step, metrics) still on the device: reading them a step late never blocks
            )
            for step in range(done + 1, config.train.steps + 1):
                state, values = step_fn(state, begin.on_devices(next(stream)))
                if previous:
                    report(*previous, config, metrics, progress, tokens)
                previous = (step, values)
                if due.evaluation(step):
                    report(*previous, config, metrics, progress, tokens)
                    previous = None
                    metrics.write(step, validate(begin, evaluate_fn, state.variables, chat))
                stopping = interrupt.stop_requested(step)
                if due.save(step) or stopping:
                    checkpoints.save(step, state, stream)
                if stopping:
                    break
            if previous:
                report(*previous, config, metrics, progress, tokens)
        finished = int(state.step) >= config.train.steps
    write_summary(workdir, {stage: stage_summary(config, workdir, stage)})
    return finished


def compiled(begin: Setup, step: Step, optimizer: optax.GradientTransformation) -> Callable:
    """The step as a program for this mesh and these shapes, and no others: state in, and out, as
    `abstract_state` lays it out.
    """
    with jax.set_mesh(begin.mesh):  # which a thread does not inherit
        state = abstract_state(begin.model, optimizer, begin.mesh)
        batch = abstract_batch(begin.config.data.batch_size, begin.config.data.seq_len, begin.mesh)
        return jit_step(step, state, begin.mesh).lower(state, batch).compile()


class Due:
    """What is to be done after which step; the last step has everything."""

    def __init__(self, config: Config):
        self.train = config.train

    def _every(self, step: int, period: int) -> bool:
        return step == self.train.steps or (period > 0 and step % period == 0)

    def evaluation(self, step: int) -> bool:
        return self.train.eval_batches > 0 and self._every(step, self.train.eval_every)

    def save(self, step: int) -> bool:
        return self._every(step, self.train.save_every)

    def log(self, step: int) -> bool:
        return step == 1 or self._every(step, self.train.log_every)


def report(
    step: int, values: dict, config: Config, metrics: Metrics, progress: Progress, tokens: int
) -> None:
    """Shows and writes the values of a step. Raises UserError when too many steps in a row had no
    finite gradients.
    """
    in_row = int(values["skipped_in_row"])
    if in_row >= config.train.max_skipped:
        trouble = f"the gradients of the last {in_row} steps were not finite (train.max_skipped)"
        raise UserError(f"step {step}: {trouble}; lower train.learning_rate, or look at the data")
    progress.update(step, {name: values[name] for name in SHOWN if name in values}, tokens)
    if Due(config).log(step):
        last = step == config.train.steps
        metrics.write(
            step,
            {name: value for name, value in values.items() if last or value.ndim == 0}
            | {"tokens_per_s": progress.tokens_per_s},
        )


def validate(begin: Setup, evaluate_fn, variables: dict, chat: bool) -> dict[str, float]:
    """Every term on the first eval_batches of the held-out documents, the same each time."""
    config = begin.config
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    held_out = iter(
        batches(config.data, begin.tokenizer, split="validation", seed=0, chat=chat, **process)
    )
    sums = None
    for _ in range(config.train.eval_batches):
        found = evaluate_fn(variables, begin.on_devices(next(held_out)))
        sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
    totals, weights = sums
    return {
        f"validation_{name}": float(total) / max(float(weights[name]), 1.0)
        for name, total in totals.items()
    }


if __name__ == "__main__":
    command(run)
