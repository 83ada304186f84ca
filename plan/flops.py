"""Floating-point operations of a program: counted in its jaxpr, loops and recomputation included,
and by formula, as the work that the mathematics needs.

XLA's `cost_analysis()` gives neither: it counts the body of a loop once, and a loop is how the
layers, the microbatches and the query chunks run.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.config import ModelConfig
from rl.config import SamplingConfig
from train.state import count_parameters

GROUPED = (
    "gmm",
    "tgmm",
    "gmm_v2",
    "tgmm_v2",
)  # the jitted functions that hold the grouped kernels of megablox and of tokamax


class Flops(NamedTuple):
    """Of all devices together. `grouped` is that of grouped matmuls, counted as if every row of
    their buffers were filled.
    """

    dense: float
    grouped: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.dense + other.dense, self.grouped + other.grouped)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.dense * times, self.grouped * times)


def program_flops(jaxpr: Any, rounds: int = 1) -> Flops:
    """Multiply-adds (2 each) of the matmuls in a jaxpr; what several devices repeat counts once.
    `rounds` is how often a `while` loop runs.

    A Pallas kernel counts what it states as its cost: the grouped ones what the mathematics needs,
    2 * rows * D * F for each of the three products. One that states none counts its body in every
    program of its grid.
    """
    total = Flops(0.0, 0.0)
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, shapes = eqn.primitive.name, [getattr(var.aval, "shape", ()) for var in eqn.invars]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += Flops(
                2.0
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(shapes[0][d] for d in contracted),
                0.0,
            )
        elif cost := eqn.params.get("cost_estimate"):
            total += Flops(cost.flops, 0.0)
        elif name == "cond":
            total += max(program_flops(branch, rounds) for branch in eqn.params["branches"])
        else:
            times = {"scan": eqn.params.get("length", 1), "while": rounds}.get(name, 1)
            if name == "shard_map":
                times = eqn.params["mesh"].size  # its shapes are those of one device
            elif name == "pallas_call":
                times = math.prod(
                    eqn.params["grid_mapping"].grid
                )  # a grid known only at run time comes with a cost
            inner = (
                sum((program_flops(inner, rounds) for inner in _inner(eqn.params)), Flops(0.0, 0.0))
                * times
            )
            total += Flops(0.0, inner.dense) if eqn.params.get("name") in GROUPED else inner
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def attended(queries: range, topk: int) -> float:
    """Keys that causal queries at these positions attend to, in all; at most topk each."""
    return float(sum(min(position + 1, topk) for position in queries))


def weights_of_a_token(model: ModelConfig, heads: int, *, mtp: bool, indexer: bool) -> int:
    """Parameters that multiply one token's hidden state, the output head counted `heads` times. A
    look-up of an embedding multiplies nothing.
    """
    without = dataclasses.replace(model.indexer, n_heads=0)
    used = dataclasses.replace(
        model,
        num_nextn_predict_layers=model.num_nextn_predict_layers if mtp else 0,
        indexer=model.indexer if indexer else without,
    )
    table = model.vocab_size * model.hidden_size
    return (
        count_parameters(used)[1] - table * (1 if model.tie_word_embeddings else 2) + heads * table
    )


class Mixing(NamedTuple):
    """What one layer's attention multiplies besides parameters, in multiply-adds: for each key that
    a query attends to, expanded and (of a decoder) over what it has cached; and for each token
    whatever the context, which are three products of a delta layer's keys and its state.
    """

    expanded: int
    cached: int
    constant: int
    indexed: bool


def mixing(model: ModelConfig, mtp: bool) -> list[Mixing]:
    """Of each layer."""
    a, g, d = model.mla, model.gqa, model.delta
    of = {
        "mla": Mixing(
            a.num_attention_heads * (a.qk_head_dim + a.v_head_dim),
            a.num_attention_heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim),
            0,
            model.indexer.n_heads > 0,
        ),
        "gqa": Mixing(
            2 * g.num_attention_heads * g.head_dim, 2 * g.num_attention_heads * g.head_dim, 0, False
        ),
        "delta": Mixing(0, 0, 3 * d.num_value_heads * d.key_head_dim * d.value_head_dim, False),
    }
    return [
        of[kind.attention]
        for kind in (
            *model.kinds,
            *[model.mtp_kind] * (model.num_nextn_predict_layers if mtp else 0),
        )
    ]


def train_formula(model: ModelConfig, stage: str, rows: int, length: int) -> float:
    """6 * parameters * tokens, and attention's 6 * layers * heads * (query + value width) per
    attended key; each row one document.

    Attention is causal; in stage "sparse" a query has topk keys where there is an indexer, which
    finds them at the price of scoring all. In stage "warmup" only the indexer has a backward pass.
    """
    i, tokens, queries = model.indexer, rows * length, range(length)
    trunk = 2 if stage == "warmup" else 6
    flops = (
        trunk
        * weights_of_a_token(
            model, 1 + model.num_nextn_predict_layers, mtp=True, indexer=stage != "dense"
        )
        * tokens
    )
    for layer in mixing(model, mtp=True):
        keys = attended(queries, i.topk if stage == "sparse" and layer.indexed else length)
        flops += trunk * (rows * keys * layer.expanded + tokens * layer.constant)
        if stage != "dense" and layer.indexed:
            flops += 6 * rows * attended(queries, length) * i.n_heads * i.head_dim
    return float(flops)


def rollout_formula(
    model: ModelConfig, sampling: SamplingConfig, prompts: int, group: int
) -> float:
    """2 * parameters * tokens and attention: expanded over the prompts, over what is cached for
    what is sampled. Every completion as long as it may be.
    """
    i, T, C = model.indexer, sampling.max_prompt_tokens, sampling.max_new_tokens
    rows, read, written = prompts * group, range(T), range(T, T + C)
    sparse = sampling.attention == "sparse" and i.n_heads > 0
    layer_weights = weights_of_a_token(model, 0, mtp=False, indexer=sparse)
    head = model.vocab_size * model.hidden_size
    flops = 2 * prompts * (layer_weights * T + head) + 2 * rows * (layer_weights + head) * C
    for layer in mixing(model, mtp=False):
        topk = i.topk if sparse and layer.indexed else T + C
        flops += 2 * prompts * (attended(read, topk) * layer.expanded + layer.constant * T)
        flops += 2 * rows * (attended(written, topk) * layer.cached + layer.constant * C)
        if sparse and layer.indexed:
            flops += (
                2
                * i.n_heads
                * i.head_dim
                * (prompts * attended(read, T) + rows * attended(written, T + C))
            )
    return float(flops)
