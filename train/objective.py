"""What a step minimises: a sum of terms, each a total over a weight.

The weights depend on the batch alone, so a step adds them up over the whole global batch before it
differentiates anything:

    loss = sum_j  coefficient_j * total_j / weight_j

and the gradient of a microbatch is that of its totals over the *global* weights. Cutting the batch
differently, over microbatches or devices, changes nothing but the order of summation. The same type
serves pretraining, fine-tuning (here) and every RL loss (rl/objective.py).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.stacks import LayerKind
from model.heads import token_logprobs
from model.segments import same_segment, shift_left
from model.transformer import LayerReports, Output, Transformer
from train.config import TrainConfig


class Totals(NamedTuple):
    """What one microbatch adds: a total per term, tokens per expert [L', E], and quantities of
    which the largest is wanted.
    """

    terms: dict[str, Array]
    counts_LE: Array
    maxima: dict[str, Array]

    def __add__(self, other: "Totals") -> "Totals":
        terms = {name: value + other.terms[name] for name, value in self.terms.items()}
        return Totals(
            terms,
            self.counts_LE + other.counts_LE,
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
        )


@dataclasses.dataclass(frozen=True)
class Objective:
    """
    weights: batch -> {term: weight}, float32 scalars.
    totals: (variables, batch) -> Totals. Terms without a coefficient are metrics only.
    coefficients: of the terms that are minimised.
    """

    weights: Callable[[dict[str, Array]], dict[str, Array]]
    totals: Callable[[dict, dict[str, Array]], Totals]
    coefficients: dict[str, float]


def target_weights(batch: dict[str, Array], ahead: int) -> Array:
    """How much position t's prediction of token t + ahead counts: that token's weight, if it lies
    in the same segment. [B, T] float32.
    """
    return shift_left(batch["weights"], ahead) * same_segment(batch["segments"], ahead)


def prediction_total(
    config: ModelConfig, params, hidden_BTD: Array, batch: dict[str, Array], ahead: int
) -> Array:
    """Cross-entropy in nats, summed by `target_weights`."""
    logprobs_BT, _ = token_logprobs(config, params, hidden_BTD, shift_left(batch["tokens"], ahead))
    return -jnp.sum(logprobs_BT * target_weights(batch, ahead))


def has_indexer(kind: LayerKind) -> bool:
    return kind.attention == "mla"


def layer_weights(
    config: ModelConfig, stage: str, batch: dict[str, Array], mtp_depth: int
) -> dict[str, Array]:
    """Weights of the terms that the layers report: tokens, summed over layers and the MTP modules
    that run. To a module those count whose next tokens it can read.
    """

    def over_layers(has: Callable[[LayerKind], bool], counts_BT: Array | bool) -> Array:
        tokens = [
            jnp.sum(same_segment(batch["segments"], k) & counts_BT, dtype=jnp.float32)
            for k in range(mtp_depth + 1)
        ]
        return sum(map(has, config.kinds)) * tokens[0] + has(config.mtp_kind) * sum(tokens[1:])

    weights = {}
    if config.moe_layers:
        weights["balance"] = over_layers(lambda kind: kind.moe, True)
    if stage != "dense":
        weights["indexer_kl"] = over_layers(has_indexer, True)
    if stage == "warmup":
        # Queries with more candidates than topk: the position inside the segment says how many
        # there are.
        recall = over_layers(has_indexer, batch["positions"] >= config.indexer.topk)
        weights |= {"indexer_recall": recall, "indexer_recall_random": recall}
    return weights


def layer_totals(config: ModelConfig, stage: str, reports: LayerReports) -> dict[str, Array]:
    totals = {}
    if config.moe_layers:
        totals["balance"] = jnp.sum(reports.router.balance)
    if stage != "dense":
        totals["indexer_kl"] = jnp.sum(reports.indexer.kl)
    if stage == "warmup":
        totals |= {
            "indexer_recall": jnp.sum(reports.indexer.recall),
            "indexer_recall_random": jnp.sum(reports.indexer.recall_random),
        }
    return totals


def layer_coefficients(config: ModelConfig, train: TrainConfig) -> dict[str, float]:
    coefficients = {}
    if config.moe_layers and train.stage != "warmup":
        coefficients["balance"] = train.balance_weight
    if train.stage != "dense":
        coefficients["indexer_kl"] = train.indexer_weight
    return coefficients


def trained_mtp(config: ModelConfig, train: TrainConfig) -> int:
    """How many MTP modules a step on text runs: without a weight they would cost time and teach
    nothing.
    """
    return config.num_nextn_predict_layers if train.mtp_weight > 0 else 0


def language_objective(config: ModelConfig, train: TrainConfig) -> Objective:
    """Next-token prediction, multi-token prediction, the indexer's KL and the balance loss. In
    stage "warmup" the KL alone is minimised; the rest is reported.

    The MTP term is lambda / D * sum_k L^k (arXiv 2412.19437, eq. 24 and 25).
    """
    mtp_depth = trained_mtp(config, train)
    depths = range(1, mtp_depth + 1)

    def weights(batch):
        own = {"lm": jnp.sum(target_weights(batch, 1))} | {
            f"mtp_{k}": jnp.sum(target_weights(batch, k + 1)) for k in depths
        }
        return own | layer_weights(config, train.stage, batch, mtp_depth)

    def totals(variables, batch):
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        output: Output = Transformer(config).apply(
            variables, *inputs, stage=train.stage, mtp=mtp_depth > 0
        )
        own = {"lm": prediction_total(config, variables["params"], output.hidden_BTD, batch, 1)}
        for k, hidden_BTD in zip(depths, output.mtp_hidden, strict=True):
            own[f"mtp_{k}"] = prediction_total(
                config, variables["params"], hidden_BTD, batch, k + 1
            )
        return Totals(
            own | layer_totals(config, train.stage, output.reports),
            output.reports.router.counts_E,
            {},
        )

    coefficients = layer_coefficients(config, train)
    if train.stage != "warmup":
        coefficients |= {"lm": 1.0} | {f"mtp_{k}": train.mtp_weight / mtp_depth for k in depths}
    return Objective(weights, totals, coefficients)


def weighted_loss(
    objective: Objective, totals: dict[str, Array], weights: dict[str, Array]
) -> Array:
    """sum_j coefficient_j * total_j / weight_j; a term that nothing weighs is 0."""
    terms = [
        c * totals[name] / jnp.where(weights[name] == 0, 1, weights[name])
        for name, c in objective.coefficients.items()
    ]
    return sum(terms, start=jnp.zeros((), jnp.float32))


def split_microbatches(batch: dict[str, Array], pieces: int) -> dict[str, Array]:
    """[B, ...] to [pieces, B / pieces, ...], every device's rows cut alike."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0), batch
    )
