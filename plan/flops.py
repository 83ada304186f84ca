"""Counts the floating-point operations of a program, in its jaxpr and by formula.

The count in the jaxpr has loops and recomputation in it; the formula is the work that the
mathematics needs. XLA's `cost_analysis()` gives neither: it counts the body of a loop once, and a
loop is how the layers, the microbatches and the query chunks run.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.config import ModelConfig
from model.layer_configs import AttentionCost
from model.layers.table import ATTENTION_TYPES
from rl.config import SamplingConfig
from train.state import count_parameters

# The jitted functions that contain the grouped matmul kernels of megablox and of tokamax.
GROUPED = ("gmm", "tgmm", "gmm_v2", "tgmm_v2")


class Flops(NamedTuple):
    """FLOPs of all devices added up, with those of grouped matmuls apart.

    The latter are counted as if every row of their buffers were filled.
    """

    dense: float
    grouped: float

    def plus(self, other: "Flops") -> "Flops":
        """Adds each kind to its own."""
        return Flops(self.dense + other.dense, self.grouped + other.grouped)

    def times(self, count: float) -> "Flops":
        """Multiplies both kinds."""
        return Flops(self.dense * count, self.grouped * count)


def program_flops(jaxpr: Any, trip_count: int = 1) -> Flops:
    """Counts the multiply-adds (2 FLOPs each) of the matmuls in a jaxpr.

    What several devices repeat counts once. A Pallas kernel counts what it states as its cost: the
    grouped ones what the mathematics needs, 2 * rows * D * F for each of the three products. One
    that states none counts its body in every program of its grid.

    Args:
      jaxpr: a Jaxpr, or a ClosedJaxpr.
      trip_count: how often a `while` loop runs.
    """
    total = Flops(0.0, 0.0)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total = total.plus(_equation_flops(equation, trip_count))
    return total


def _equation_flops(equation: Any, trip_count: int) -> Flops:
    """Counts the FLOPs of one equation of a jaxpr, the loops and calls in it included."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot_flops(equation), 0.0)
    if cost := params.get("cost_estimate"):
        return Flops(cost.flops, 0.0)
    if name == "cond":
        return max(program_flops(branch, trip_count) for branch in params["branches"])
    inner = Flops(0.0, 0.0)
    for jaxpr in _inner_jaxprs(params):
        inner = inner.plus(program_flops(jaxpr, trip_count))
    inner = inner.times(_repetitions(name, params, trip_count))
    return Flops(0.0, inner.dense) if params.get("name") in GROUPED else inner


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = (var.aval.shape for var in (equation.invars[0], equation.outvars[0]))
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _repetitions(name: str, params: dict[str, Any], trip_count: int) -> int:
    """Returns how often the jaxprs inside a primitive run, on all devices."""
    if name == "shard_map":
        return params["mesh"].size  # its shapes are those of one device
    if name == "pallas_call":
        # A grid that is known only at run time comes with a cost.
        return math.prod(params["grid_mapping"].grid)
    return {"scan": params.get("length", 1), "while": trip_count}.get(name, 1)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def attended_keys(queries: range, most: int) -> float:
    """Counts the keys that causal queries at these positions attend to, each to at most `most`."""
    return float(sum(min(position + 1, most) for position in queries))


def parameters_per_token(model: ModelConfig, heads: int, *, mtp: bool, indexer: bool) -> int:
    """Counts the parameters that multiply one token's hidden state.

    The look-up of an embedding multiplies nothing.

    Args:
      model: its config.
      heads: how often the output head is counted.
      mtp: whether the MTP modules count.
      indexer: whether the indexers count.
    """
    without = dataclasses.replace(model.indexer, n_heads=0)
    used = dataclasses.replace(
        model,
        num_nextn_predict_layers=model.num_nextn_predict_layers if mtp else 0,
        indexer=model.indexer if indexer else without,
    )
    embedding = model.vocab_size * model.hidden_size
    embeddings = embedding * (1 if model.tie_word_embeddings else 2)
    return count_parameters(used)[1] - embeddings + heads * embedding


class LayerCost(NamedTuple):
    """Holds the cost of one layer's attention, and whether an indexer selects its keys."""

    attention: AttentionCost
    indexed: bool


def layer_costs(model: ModelConfig, mtp: bool) -> list[LayerCost]:
    """Returns the cost of each layer, followed by that of the MTP modules if `mtp`."""
    mtp_layers = model.num_nextn_predict_layers if mtp else 0
    kinds = (*model.kinds, *[model.mtp_kind] * mtp_layers)
    return [
        LayerCost(
            attention=getattr(model, kind.attention).cost,
            indexed=ATTENTION_TYPES[kind.attention].has_indexer and model.indexer.n_heads > 0,
        )
        for kind in kinds
    ]


def train_formula(model: ModelConfig, stage: str, rows: int, length: int) -> float:
    """Returns the FLOPs that the mathematics of a train step needs.

    They are 6 * parameters * tokens, and attention's 6 * layers * heads * (query + value width) for
    each attended key. Attention is causal; in stage "sparse" a query has topk keys where there is
    an indexer, which finds them at the price of scoring all. In stage "warmup" only the indexer has
    a backward pass.

    Args:
      model: its config, with as many MTP modules as are trained.
      stage: "dense", "warmup" or "sparse".
      rows: rows of the batch, each of one document.
      length: tokens of a row.
    """
    indexer, tokens, queries = model.indexer, rows * length, range(length)
    trunk = 2 if stage == "warmup" else 6
    heads = 1 + model.num_nextn_predict_layers
    parameters = parameters_per_token(model, heads, mtp=True, indexer=stage != "dense")
    flops = trunk * parameters * tokens
    for cost, indexed in layer_costs(model, mtp=True):
        most = indexer.topk if stage == "sparse" and indexed else cost.most_keys or length
        keys = attended_keys(queries, most)
        flops += trunk * (rows * keys * cost.expanded + tokens * cost.constant)
        if stage != "dense" and indexed:
            scored = attended_keys(queries, length)
            flops += 6 * rows * scored * indexer.n_heads * indexer.head_dim
    return float(flops)


def rollout_formula(
    model: ModelConfig, sampling: SamplingConfig, prompts: int, group: int
) -> float:
    """Returns the FLOPs that the mathematics of a rollout needs.

    They are 2 * parameters * tokens, and attention, expanded over the prompts and over what is
    cached for the sampled tokens. Prompts and completions count as long as they may be.

    Args:
      model: its config.
      sampling: the lengths, and whether attention is sparse.
      prompts: prompts of a step.
      group: completions of each prompt.
    """
    indexer, prompt, new = model.indexer, sampling.max_prompt_tokens, sampling.max_new_tokens
    completions, prefilled, decoded = prompts * group, range(prompt), range(prompt, prompt + new)
    sparse = sampling.attention == "sparse" and indexer.n_heads > 0
    layers = parameters_per_token(model, 0, mtp=False, indexer=sparse)
    head = model.vocab_size * model.hidden_size
    flops = 2 * prompts * (layers * prompt + head) + 2 * completions * (layers + head) * new
    for cost, indexed in layer_costs(model, mtp=False):
        most = indexer.topk if sparse and indexed else cost.most_keys or prompt + new
        keys = attended_keys(prefilled, most)
        flops += 2 * prompts * (keys * cost.expanded + cost.constant * prompt)
        keys = attended_keys(decoded, most)
        flops += 2 * completions * (keys * cost.cached + cost.constant * new)
        if sparse and indexed:
            scored = prompts * attended_keys(prefilled, prompt)
            scored += completions * attended_keys(decoded, prompt + new)
            flops += 2 * indexer.n_heads * indexer.head_dim * scored
    return float(flops)
