"""Decides when a training loop evaluates, saves and logs, and logs its steps."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jax import Array

from errors import UserError
from train.config import TrainConfig
from train.metrics import Metrics
from train.progress import Progress

# Metrics that the progress line shows, where the step has them.
ON_PROGRESS_LINE = (
    "reward",
    "lm",
    "preference_loss",
    "rewards/accuracies",
    "indexer_kl",
    "completions/mean_length",
    "entropy",
)
OF_VALIDATION = ("validation_lm", "validation_rewards/accuracies", "validation_pass_at_1")


@dataclasses.dataclass(frozen=True)
class Due:
    """Says what is due after which step. After the last step everything is."""

    train: TrainConfig

    def evaluation(self, step: int) -> bool:
        """Returns whether held-out text is evaluated after `step`."""
        return self.train.eval_batches > 0 and self._every(step, self.train.eval_every)

    def save(self, step: int) -> bool:
        """Returns whether a checkpoint is saved after `step`."""
        return self._every(step, self.train.save_every)

    def log(self, step: int) -> bool:
        """Returns whether the metrics of `step` are written; those of the first step are."""
        return step == 1 or self._every(step, self.train.log_every)

    def _every(self, step: int, period: int) -> bool:
        return step == self.train.steps or (period > 0 and step % period == 0)


@dataclasses.dataclass(frozen=True)
class StepLog:
    """Shows each step on the progress line, and writes those that are due to metrics.jsonl."""

    train: TrainConfig
    metrics: Metrics
    progress: Progress

    def record(self, step: int, values: Mapping[str, Array | np.ndarray], tokens: int) -> None:
        """Shows and writes what a step measured.

        Args:
          step: steps done.
          values: the metrics of `train.step.make_step`, on the device or the host. Arrays that are
            not scalars are written after the last step only.
          tokens: tokens that the step processed.

        Raises:
          UserError: the gradients of `train.max_skipped` steps in a row were not finite.
        """
        in_row = int(values["skipped_in_row"])
        if in_row >= self.train.max_skipped:
            raise UserError(
                f"step {step}: the gradients of the last {in_row} steps were not finite "
                "(train.max_skipped); lower train.learning_rate, or look at the data"
            )
        shown = {name: values[name] for name in ON_PROGRESS_LINE if name in values}
        self.progress.update(step, shown, tokens)
        if Due(self.train).log(step):
            last = step == self.train.steps
            written = {name: value for name, value in values.items() if last or value.ndim == 0}
            speed = {"tokens_per_s": self.progress.tokens_per_s}
            self.metrics.write(step, written | speed)

    def validation(self, step: int, means: Mapping[str, float]) -> None:
        """Writes what a step's evaluation measured, and shows the most important of it."""
        self.metrics.write(step, means)
        shown = [f"{name} {means[name]:.4g}" for name in OF_VALIDATION if name in means]
        self.progress.note("  ".join([f"step {step}:", *shown]))
