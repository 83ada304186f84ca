"""Defines what a step minimises: a sum of terms, each a `Mean` with a coefficient.

    loss = sum_j  coefficient_j * total_j / weight_j

The weights depend on the batch alone, so a step adds them up over the whole global batch before it
differentiates anything, and the gradient of a microbatch is that of its totals over the *global*
weights. Cutting the batch differently, over microbatches or devices, changes nothing but the order
of summation. The same type serves pretraining and fine-tuning (`language_objective`, here) and
every RL loss (`rl/objective.py`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.heads import token_logprobs
from model.layers.table import ATTENTION_TYPES
from model.segments import same_segment, shift_left
from model.stacks import LayerKind
from model.transformer import LayerStats, Output, Transformer
from train.config import TrainConfig
from train.mean import Mean

Batch = dict[str, Array]


class Totals(NamedTuple):
    """Holds what a microbatch adds to the step.

    terms: the total of each term, a float32 scalar.
    counts_LE: tokens per expert and layer, MTP modules last.
    maxima, minima: quantities of which the step reports the largest, or the least.
    """

    terms: dict[str, Array]
    counts_LE: Array
    maxima: dict[str, Array]
    minima: dict[str, Array]

    def __add__(self, other: "Totals") -> "Totals":
        terms = {name: total + other.terms[name] for name, total in self.terms.items()}
        maxima = jax.tree.map(jnp.maximum, self.maxima, other.maxima)
        minima = jax.tree.map(jnp.minimum, self.minima, other.minima)
        return Totals(terms, self.counts_LE + other.counts_LE, maxima, minima)

    def before_any(self) -> "Totals":
        """Returns the totals, of the same shapes, to which those of a first microbatch are added.

        The leaves may be arrays or `jax.ShapeDtypeStruct`s.
        """

        def filled(value: float, leaves: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), leaves)

        terms, counts_LE = filled(0, self.terms), filled(0, self.counts_LE)
        return Totals(terms, counts_LE, filled(-jnp.inf, self.maxima), filled(jnp.inf, self.minima))


@dataclasses.dataclass(frozen=True)
class Term:
    """A named quantity that a step reports and, with a coefficient, minimises.

    name: its key in `Totals.terms` and in metrics.jsonl.
    weight: what its total is divided by, a float32 scalar from the batch alone.
    coefficient: its factor in the loss; None for a metric.
    """

    name: str
    weight: Callable[[Batch], Array]
    coefficient: float | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms, and the function that adds up their totals over a batch.

    terms: in the order in which the loss adds them.
    totals: (variables, batch) -> Totals, with one total for each term.
    signal: batch -> bool scalar, whether a batch has anything to learn from: a step on one that has
      not changes nothing. None where every batch has.
    reads: names of arrays [B, T], float32, that a batch has beside those of data/packing.py, where
      it comes from there.
    """

    terms: tuple[Term, ...]
    totals: Callable[[dict, Batch], Totals]
    signal: Callable[[Batch], Array] | None = None
    reads: tuple[str, ...] = ()

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Returns the weight of each term, over the whole of a batch."""
        return {term.name: term.weight(batch) for term in self.terms}

    def loss(self, means: Mapping[str, Mean]) -> Array:
        """Returns sum_j coefficient_j * total_j / weight_j, a float32 scalar.

        A term over nothing (weight 0) adds nothing.
        """
        minimised = [
            (term.coefficient * means[term.name]).value
            for term in self.terms
            if term.coefficient is not None
        ]
        return sum(minimised, start=jnp.zeros((), jnp.float32))


def means_of(totals: Totals, weights: Mapping[str, Array]) -> dict[str, Mean]:
    """Pairs the total of each term with its weight."""
    return {name: Mean(total, weights[name]) for name, total in totals.terms.items()}


def language_objective(config: ModelConfig, train: TrainConfig) -> Objective:
    """Builds the objective of pretraining and fine-tuning.

    Its terms are next-token prediction, multi-token prediction lambda / D * sum_k L^k (arXiv
    2412.19437, eq. 24 and 25), the indexer's KL and the balance loss. In stage "warmup" the KL
    alone is minimised, and the rest is reported.
    """
    mtp_depth = trained_mtp(config, train)
    depths = range(1, mtp_depth + 1)

    def prediction(name: str, ahead: int, coefficient: float) -> Term:
        minimised = train.stage != "warmup"
        weight = functools.partial(prediction_weight, ahead=ahead)
        return Term(name, weight, coefficient if minimised else None)

    def totals(variables: dict, batch: Batch) -> Totals:
        """Computes the totals of a microbatch: predictions of each depth, and the layers."""
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        applied = Transformer(config).apply(
            variables, *inputs, stage=train.stage, mtp=mtp_depth > 0
        )
        output = cast(Output, applied)
        predicted = functools.partial(prediction_total, config, variables["params"])
        terms = {"lm": predicted(output.hidden_BTD, batch, ahead=1)}
        for k, hidden_BTD in zip(depths, output.mtp_hidden, strict=True):
            terms[f"mtp_{k}"] = predicted(hidden_BTD, batch, ahead=k + 1)
        terms |= layer_totals(config, train.stage, output.stats)
        return Totals(terms, output.stats.router.counts_E, maxima={}, minima={})

    terms = (
        *layer_terms(config, train, mtp_depth),
        prediction("lm", ahead=1, coefficient=1.0),
        *(prediction(f"mtp_{k}", k + 1, train.mtp_weight / mtp_depth) for k in depths),
    )
    return Objective(terms, totals)


def trained_mtp(config: ModelConfig, train: TrainConfig) -> int:
    """Returns how many MTP modules a step on text runs.

    Without a weight in the loss they would cost time and teach nothing, so none runs.
    """
    return config.num_nextn_predict_layers if train.mtp_weight > 0 else 0


def target_weights(batch: Batch, ahead: int) -> Array:
    """Returns how much the prediction of token t + ahead at position t counts, [B, T] float32.

    It counts as that token's loss weight if the token is in the same segment, else 0.
    """
    return shift_left(batch["weights"], ahead) * same_segment(batch["segments"], ahead)


def prediction_weight(batch: Batch, ahead: int) -> Array:
    """Sums `target_weights` over a batch, a float32 scalar."""
    return jnp.sum(target_weights(batch, ahead))


def prediction_total(
    config: ModelConfig, params: dict, hidden_BTD: Array, batch: Batch, ahead: int
) -> Array:
    """Sums the cross-entropy of the tokens `ahead` places on, in nats, by `target_weights`."""
    logprobs_BT, _ = token_logprobs(config, params, hidden_BTD, shift_left(batch["tokens"], ahead))
    return -jnp.sum(logprobs_BT * target_weights(batch, ahead))


def layer_terms(config: ModelConfig, train: TrainConfig, mtp_depth: int) -> list[Term]:
    """Lists the terms that the layers report; their totals are `layer_totals`.

    Each is a mean over the tokens of all its layers. Where losses are added over layers
    (`train.layer_losses`), its coefficient is as many times larger as it has layers.

    The warm-up stage minimises the indexer's KL alone, and reports how much of dense attention's
    probability mass the selected keys have (indexer_recall), beside a random selection.

    Args:
      mtp_depth: how many MTP modules run.
    """

    def layer_loss(name: str, has: Callable[[LayerKind], bool], coefficient: float | None) -> Term:
        if coefficient is not None and train.layer_losses == "sum":
            coefficient *= sum(map(has, config.kinds)) + mtp_depth * has(config.mtp_kind)
        return Term(name, functools.partial(layer_tokens, config, has, mtp_depth), coefficient)

    terms = []
    if config.moe_layers:
        minimised = None if train.stage == "warmup" else train.balance_weight
        terms.append(layer_loss("balance", lambda kind: kind.moe, minimised))
    if train.stage != "dense":
        terms.append(layer_loss("indexer_kl", has_indexer, train.indexer_weight))
    if train.stage == "warmup":
        weight = functools.partial(selecting_tokens, config, mtp_depth)
        terms += [Term("indexer_recall", weight), Term("indexer_recall_random", weight)]
    return terms


def has_indexer(kind: LayerKind) -> bool:
    """Returns whether layers of this kind select keys by an indexer of their own."""
    return ATTENTION_TYPES[kind.attention].has_indexer


def layer_tokens(
    config: ModelConfig,
    has: Callable[[LayerKind], bool],
    mtp_depth: int,
    batch: Batch,
    counted_BT: Array | bool = True,
) -> Array:
    """Counts tokens, added over the layers of some kinds and the MTP modules that run, float32.

    In the module of depth k those tokens count whose k next ones are in the same segment: it reads
    no others.

    Args:
      has: says of a kind of layer whether it is one of those.
      counted_BT: which tokens count.
    """
    tokens = [
        jnp.sum(same_segment(batch["segments"], k) & counted_BT, dtype=jnp.float32)
        for k in range(mtp_depth + 1)
    ]
    return sum(map(has, config.kinds)) * tokens[0] + has(config.mtp_kind) * sum(tokens[1:])


def selecting_tokens(config: ModelConfig, mtp_depth: int, batch: Batch) -> Array:
    """Counts the queries with more candidates than topk, over the layers with an indexer, float32.

    The position inside the segment says how many candidates a query has.
    """
    counted_BT = batch["positions"] >= config.indexer.topk
    return layer_tokens(config, has_indexer, mtp_depth, batch, counted_BT)


def layer_totals(config: ModelConfig, stage: str, reports: LayerStats) -> dict[str, Array]:
    """Sums what the layers report over the layers: the total of each of `layer_terms`."""
    totals = {}
    if config.moe_layers:
        totals["balance"] = jnp.sum(reports.router.balance)
    if stage != "dense":
        totals["indexer_kl"] = jnp.sum(reports.indexer.kl)
    if stage == "warmup":
        totals["indexer_recall"] = jnp.sum(reports.indexer.recall)
        totals["indexer_recall_random"] = jnp.sum(reports.indexer.recall_random)
    return totals


def split_microbatches(batch: Batch, microbatches: int) -> Batch:
    """Cuts [B, ...] into [microbatches, B / microbatches, ...].

    Each microbatch takes every so many-th row, so that every device's rows are cut alike.
    """

    def cut(rows: Array) -> Array:
        size = rows.shape[0] // microbatches
        return jnp.moveaxis(rows.reshape(size, microbatches, *rows.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)
