"""A language model on held-out text: the training terms, infilling, and the indexer's recall."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax import Array

from data.config import DataConfig
from data.shuffled_texts import infill_documents
from kernels.device import compiler_options
from model.sharding import batch_sharding, replicated
from train.config import TrainConfig
from train.infill import infill_rows, middle_losses, middle_nats
from train.mean import Mean
from train.metrics import read_metrics
from train.objective import language_objective
from train.preference_objective import preference_objective, scored_by_reference
from train.preferences import Preference
from train.setup import Setup, open_batches
from train.step import jit_evaluation

# (variables, batch) -> the mean of each term
Evaluation = Callable[[dict, dict[str, Array]], dict[str, Mean]]

# A file is cut into texts of about this many bytes for each token of a row: most texts then fill a
# good part of a row, and few are too long for one.
INFILL_BYTES_PER_TOKEN = 2


def validation_means(
    setup: Setup,
    evaluate_fn: Callable,
    variables: dict,
    data: DataConfig,
    count: int,
    *,
    chat: bool,
    loss: Callable[[Mapping[str, Mean]], Array] | None = None,
) -> dict[str, float]:
    """Returns the mean of every term over the first `count` batches of the held-out documents.

    The batches are the same each time.

    Args:
      evaluate_fn: `train.step.jit_evaluation` of the objective.
      chat: whether the documents are conversations.
      loss: `Objective.loss`, where "validation_loss" is wanted too.

    Returns:
      {"validation_lm": nats per token, ...}.
    """
    held_out = open_batches(setup, data, "validation", seed=0, chat=chat)
    found = [evaluate_fn(variables, setup.on_devices(next(held_out))) for _ in range(count)]
    sums = {
        name: jax.tree.map(float, functools.reduce(operator.add, [one[name] for one in found]))
        for name in found[0]
    }
    means = {f"validation_{name}": mean.value for name, mean in sums.items()}
    return means if loss is None else means | {"validation_loss": float(loss(sums))}


def was_evaluated(path: Path, phase: str, step: int) -> bool:
    """Returns whether metrics.jsonl at `path` has the validation of this step of a phase."""
    return any(
        line.get("stage") == phase
        and line.get("step") == step
        and any(name.startswith("validation_") for name in line)
        for line in read_metrics(path)
    )


def held_out_loss(
    setup: Setup, variables: dict, train: TrainConfig, data: DataConfig, count: int, *, chat: bool
) -> dict[str, float]:
    """Returns {"held_out_loss": nats a token} of the first `count` batches of held-out documents.

    It is the mean of next-token prediction over their targets, as `validation_lm` of a run on the
    same data. `chat`: only the assistant's words are targets.
    """
    without_mtp = dataclasses.replace(train, mtp_weight=0.0)
    evaluate_fn = jit_evaluation(language_objective(setup.model, without_mtp), setup.mesh)
    found = validation_means(setup, evaluate_fn, variables, data, count, chat=chat)
    return {"held_out_loss": found["validation_lm"]}


def held_out_preferences(
    setup: Setup,
    variables: dict,
    reference: dict | None,
    preference: Preference,
    train: TrainConfig,
    data: DataConfig,
    count: int,
) -> dict[str, float]:
    """Returns what a run on pairs logs, over the first `count` batches of held-out pairs.

    Args:
      reference: that of the run; None where the loss compares with none.

    Returns:
      {"held_out_loss": ..., "held_out_rewards/accuracies": ..., ...}, each as `validation_...` of
      the run.
    """
    without_mtp = dataclasses.replace(train, mtp_weight=0.0)
    objective = preference_objective(setup.model, without_mtp, preference)
    evaluate_fn = jit_evaluation(objective, setup.mesh)
    scored = scored_by_reference(setup, train, reference)
    found = validation_means(
        setup,
        lambda variables, batch: evaluate_fn(variables, scored(batch)),
        variables,
        data,
        count,
        chat=True,
        loss=objective.loss,
    )
    return {name.replace("validation_", "held_out_", 1): value for name, value in found.items()}


def infilling(
    setup: Setup, variables: dict, data: DataConfig, *, stage: str, count: int, resamples: int
) -> dict:
    """Returns the losses of held-out middles with their suffix and without (train/infill.py).

    Args:
      stage: "dense" or "sparse" attention.
      count: documents of each source; rounded up to whole batches.
      resamples: bootstrap resamples of the documents.

    Returns:
      "middle_loss_...", each the mean over the sources that FIM applies to, and "infilling", the
      losses of each of those sources.
    """
    tokenizer = setup.tokenizer
    sharding = batch_sharding(setup.mesh)
    count += -count % data.batch_size
    # Every process has all the rows, and needs all the results.
    nats_fn = jax.jit(
        functools.partial(middle_nats, setup.model, stage, tokenizer.eos),
        out_shardings=replicated(setup.mesh),
        compiler_options=compiler_options(setup.mesh),
    )
    by_source = {}
    longest = INFILL_BYTES_PER_TOKEN * data.seq_len
    for source, held_out in infill_documents(data, "validation", longest).items():
        texts = (text for _, text in held_out)
        rows = infill_rows(texts, tokenizer, data.seq_len, count, spm=data.infills_spm)
        by_source[source] = middle_losses(
            rows,
            lambda batch: nats_fn(variables, jax.device_put(batch, sharding)),
            data.batch_size,
            resamples,
        )
    names = [name for name in next(iter(by_source.values())) if name.startswith("middle_loss")]
    means = {
        name: float(np.mean([losses[name] for losses in by_source.values()])) for name in names
    }
    return means | {"infilling": by_source}


def indexer_recall(
    setup: Setup, variables: dict, train: TrainConfig, data: DataConfig
) -> dict[str, float]:
    """Returns how well the indexer selects, over held-out text.

    The recall is the share of dense attention's probability mass that falls on the keys that the
    indexer would select; beside it stands that of a random selection of as many.
    """
    warmup = dataclasses.replace(train, stage="warmup")
    evaluate_fn = jit_evaluation(language_objective(setup.model, warmup), setup.mesh)
    batches = max(train.eval_batches, 1)  # a run that does not validate has a recall too
    found = validation_means(setup, evaluate_fn, variables, data, batches, chat=False)
    names = ("indexer_recall", "indexer_recall_random", "indexer_kl")
    return {name: found[f"validation_{name}"] for name in names}
