"""Measures what reading only a share p of attention costs a trained model (arXiv 2502.02770).

    python -m bench.twilight --workdir=runs/quickstart/sparse

For each p it prints the keys kept, the true attention mass on them, the error of attention's output
and the loss. Every token of held-out rows is read as decoding would read it: through the cache,
each with the fewest keys that by estimate have p of attention (Twilight). For DSA ("indexer") the
estimate is the softmax of the indexer's scores over the keys it selected; for dense latent
attention ("int4") it is attention by latents in four bits, and what any head keeps is kept. Only
tokens with more keys before them than the indexer selects are counted. One JSON line; `error` is a
change's standard error, over rows.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from data.pipeline import batches
from errors import UserError
from experiment.command_line import command
from experiment.flags import Flag
from experiment.schema import Config
from experiment.setup import run_variables, set_up
from kernels.reference import IndexerQuery, indexer_scores, select_topk, top_p_keys
from model.attention.caches import LatentCache
from model.attention.decode import keep_by_estimate
from model.attention.int4 import dequantise
from model.attention.reference import softmax_parts
from model.cache import Cache
from model.config import ModelConfig
from model.decode_weights import DecodeWeights, decode_weights, expert_matrices, map_gate_and_up
from model.heads import embed, logits_of
from model.layers.mla import LatentAttention, Projections
from model.layers.norm import RMSNorm
from model.segments import TokenInfo
from model.transformer import Block

TOP_P = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
ESTIMATES = {"indexer": "sparse", "int4": "dense"}  # name -> the stage that decodes by it


def run(config: Config, workdir: Path, rows: int) -> None:
    """Measures every p for both estimates and prints one JSON line."""
    if not config.model.indexer.n_heads:
        raise UserError(f"{workdir}: its model has no indexer")
    setup = set_up(config, workdir, rows={}, trains=False)
    model = setup.model
    weights = decode_weights(model, run_variables(setup, config.init_from, workdir), rows)
    data = dataclasses.replace(config.data, batch_size=rows)
    batch = next(iter(batches(data, setup.tokenizer, split="validation", seed=0)))
    estimates = {}
    for name, stage in ESTIMATES.items():
        measured = [measure(model, weights, batch, stage, top_p) for top_p in TOP_P]
        _, (whole_B, count_B) = measured[-1]
        estimates[name] = [
            {"p": top_p} | figures | loss_change(nats_B, whole_B, count_B)
            for top_p, (figures, (nats_B, _)) in zip(TOP_P, measured, strict=True)
        ]
    about = {
        "bench": "twilight",
        "rows": rows,
        "sequence": config.data.seq_len,
        "topk": config.model.indexer.topk,
        "heads": config.model.mla.num_attention_heads,
    }
    print(json.dumps(about | estimates | {"dtype": model.dtype, "jax": version("jax")}))


def measure(
    model: ModelConfig,
    weights: DecodeWeights,
    batch: dict[str, np.ndarray],
    stage: str,
    top_p: float,
) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    """Reads a batch with a share `top_p` of attention.

    Returns:
      means over the counted tokens and the layers, by name; and the loss of each row in nats with
      the number of its counted tokens, as `read` has them.
    """
    layers, rows = jax.jit(functools.partial(read, model, stage=stage, top_p=top_p))(
        weights, {name: jnp.asarray(array) for name, array in batch.items()}
    )
    figures: dict = {name: round(float(jnp.mean(value)), 5) for name, value in layers.items()}
    figures["kept_by_layer"] = [round(float(kept), 2) for kept in layers["kept"]]
    nats_B, count_B = rows
    return figures, (np.asarray(nats_B), np.asarray(count_B))


def loss_change(nats_B: np.ndarray, whole_B: np.ndarray, count_B: np.ndarray) -> dict[str, float]:
    """Returns the loss a token, its distance from that of reading every key, and how sure it is.

    The standard error is that of drawing rows, not tokens.

    Args:
      nats_B: the loss of each row in nats.
      whole_B: the same when every key is read.
      count_B: counted tokens of each row.
    """
    tokens, more_B = count_B.sum(), nats_B - whole_B
    mean = more_B.sum() / tokens
    error = np.sqrt(np.sum((more_B - mean * count_B) ** 2)) / tokens
    return {
        "nll": round(float(nats_B.sum() / tokens), 5),
        "nll_change": round(float(mean), 5),
        "error": round(float(error), 5),
    }


def read(
    model: ModelConfig, weights: DecodeWeights, batch: dict[str, Array], *, stage: str, top_p: float
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Reads every token of a batch through the cache, as decoding would.

    Returns:
      for each layer what its attention kept, means over the counted tokens, [L] by name; and for
      each row the loss of predicting from those tokens, in nats, and their number, [B] each.
    """
    tokens_BT, positions_BT, segments_BT = (
        batch[name] for name in ("tokens", "positions", "segments")
    )
    B, T = tokens_BT.shape
    allowed_BTS = (
        jnp.tril(jnp.ones((T, T), bool))
        & (segments_BT[:, :, None] == segments_BT[:, None])
        & (segments_BT[:, :, None] > 0)
    )
    counted_BT = jnp.sum(allowed_BTS, axis=-1) > model.indexer.topk
    layers = []

    def intercept(next_fun, args, kwargs, context):
        if isinstance(context.module, LatentAttention) and context.method_name == "absorbed":
            out_BTNV, kept = attend_and_count(
                context.module, next_fun, *args, top_p=top_p, counted_BT=counted_BT
            )
            layers.append(kept)
            return out_BTNV, None
        return next_fun(*args, **kwargs)

    index_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    tokens = TokenInfo(positions_BT, segments_BT, stage, allowed_BTS, index_BT)
    x_BTD = embed(model, weights.params["embedding"], tokens_BT)
    caches = Cache.empty(model, B, T, stage, top_p).layers
    for kind, layer, cache in zip(model.kinds, weights.layers, caches, strict=True):
        if weights.side_by_side:
            matrices = functools.partial(expert_matrices, count=model.moe.num_experts)
            layer = map_gate_and_up(matrices, layer)
        with nn.intercept_methods(intercept):
            x_BTD, _ = Block(model, kind).apply(layer, x_BTD, tokens, cache)
    final_norm = RMSNorm(model.rms_norm_eps, model.norm)
    hidden_BTD = cast(Array, final_norm.apply({"params": weights.params["final_norm"]}, x_BTD))
    logprobs_BTV = jax.nn.log_softmax(logits_of(model, weights.params, hidden_BTD[:, :-1]), axis=-1)
    nats_BT = -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    predicts_BT = counted_BT[:, :-1] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    rows = jnp.sum(nats_BT, axis=1, where=predicts_BT), jnp.sum(predicts_BT, axis=1)
    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}, rows


def attend_and_count(
    module: LatentAttention,
    absorbed: Callable[..., tuple[Array, Array | None]],
    projected: Projections,
    cache: LatentCache,
    allowed_BTS: Array,
    query: IndexerQuery | None,
    *,
    top_p: float,
    counted_BT: Array,
) -> tuple[Array, dict[str, Array]]:
    """Returns one layer's attention [B, T, N, V] and what it keeps.

    The latter are means over the counted tokens, by name: the number of keys kept, of how many
    (those that the indexer selected, or all), the true and the estimated attention mass of the
    kept, and the relative error of the output.

    Args:
      module: the layer's attention.
      absorbed: its method of that name, which takes the next four arguments.
      projected: the queries of the layer.
      cache: of the layer, filled with the rows.
      allowed_BTS: keys that a query may see.
      query: the indexer's, None in dense attention.
      top_p: the share of attention that is kept.
      counted_BT: tokens that the means are over.
    """
    out_BTNV, _ = absorbed(projected, cache, allowed_BTS, query)
    every_key = dataclasses.replace(cache, attention_top_p=1.0, estimate=None)
    whole_BTNV, _ = absorbed(projected, every_key, allowed_BTS, query)
    q_latent_BTNR = jnp.einsum("BTNH,RNH->BTNR", projected.q_nope_BTNH, module.key_up)
    q_BTNR = jnp.concatenate([q_latent_BTNR, projected.q_rope_BTNH], axis=-1)

    def mean_probabilities(keys_BSR: Array, selected_BTS: Array) -> Array:
        """Returns attention's probabilities, means over the heads, [B, T, S]."""
        unnormalised_BNTS, sum_BNT1 = softmax_parts(
            jnp.einsum("BTNR,BSR->BNTS", q_BTNR, keys_BSR), selected_BTS
        )
        return jnp.mean(unnormalised_BNTS / sum_BNT1, axis=1)

    selected_BTS = kept_BTS = allowed_BTS
    if query is not None:
        scores_BTS = indexer_scores(query.q_BTIC, cache.index_key_BSC, query.w_BTI)
        selected_BTS = select_topk(scores_BTS, allowed_BTS, module.config.indexer.topk)
        kept_BTS = top_p_keys(scores_BTS, selected_BTS, top_p)
        estimated_BTS = jax.nn.softmax(
            jnp.where(selected_BTS, scores_BTS, -jnp.inf), axis=-1, where=selected_BTS
        )
    elif cache.estimate is not None:
        estimate_BSR = dequantise(cache.estimate, cache.latent_BSR.shape[-1])
        logits_BNTS = jnp.einsum("BTNR,BSR->BNTS", q_BTNR, estimate_BSR)
        kept_BTS = keep_by_estimate(logits_BNTS, allowed_BTS, top_p, groups=1)[:, 0]
        estimated_BTS = mean_probabilities(estimate_BSR, selected_BTS)
    else:
        estimated_BTS = mean_probabilities(cache.latent_BSR, selected_BTS)
    true_BTS = mean_probabilities(cache.latent_BSR, selected_BTS)
    norm = functools.partial(jnp.linalg.norm, axis=(-2, -1))
    kept = {
        "kept": jnp.sum(kept_BTS, axis=-1),
        "of": jnp.sum(selected_BTS, axis=-1),
        "true_mass": jnp.sum(true_BTS, axis=-1, where=kept_BTS),
        "estimated_mass": jnp.sum(estimated_BTS, axis=-1, where=kept_BTS),
        "output_error": norm(out_BTNV - whole_BTNV) / norm(whole_BTNV),
    }
    counted = jnp.sum(counted_BT)
    means = {name: jnp.sum(x_BT, where=counted_BT) / counted for name, x_BT in kept.items()}
    return out_BTNV, means


if __name__ == "__main__":
    command(run, config="recorded", flags={"rows": Flag(64, "of held-out tokens")})
