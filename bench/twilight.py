"""What reading only a share of attention's mass costs a trained model (Twilight, arXiv 2502.02770):
keys kept, true mass kept, output error, loss, against p.

    python -m bench.twilight --workdir=runs/quickstart/sparse

Every token of held-out rows is read as decoding would read it: through the cache, each with the
fewest keys that by estimate hold p. For DSA ("indexer") the estimate is the softmax of the
indexer's scores over the keys it selected; for dense latent attention ("int4") it is attention by
latents in four bits, and what any head keeps is kept. Counted are tokens with more keys before them
than the indexer selects. One JSON line; `error` is a change's standard error, over rows.
"""

import dataclasses
import functools
import json
from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from data.pipeline import batches
from errors import UserError
from experiment.command_line import Flag, command
from experiment.schema import Config
from experiment.setup import run_variables, set_up
from kernels.reference import indexer_scores, select_topk, top_p_keys
from model.attention.decode import keep_by_estimate
from model.attention.int4 import dequantise
from model.attention.reference import softmax_parts
from model.cache import Cache
from model.config import ModelConfig
from model.decode import DecodeWeights, decode_weights, expert_matrices, with_experts
from model.heads import embed, logits_of
from model.layers.mla import LatentAttention
from model.layers.norm import RMSNorm
from model.segments import TokenInfo
from model.transformer import Block

MASSES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
ESTIMATES = {"indexer": "sparse", "int4": "dense"}


def run(config: Config, workdir: Path, rows: int) -> None:
    if not config.model.indexer.n_heads:
        raise UserError(f"{workdir}: its model has no indexer")
    begin = set_up(config, workdir, rows=0, trains=False)
    weights = decode_weights(begin.model, run_variables(begin, config.init_from, workdir), rows)
    data = dataclasses.replace(config.data, batch_size=rows)
    batch = next(
        iter(
            batches(
                data,
                begin.tokenizer,
                split="validation",
                seed=0,
                chat=False,
                process_index=0,
                process_count=1,
            )
        )
    )
    found = {}
    for name, stage in ESTIMATES.items():
        measured = [measure(begin.model, weights, batch, stage, mass) for mass in MASSES]
        _, (whole_B, count_B) = measured[-1]
        found[name] = [
            {"p": mass} | layers | change(nats_B, whole_B, count_B)
            for mass, (layers, (nats_B, _)) in zip(MASSES, measured, strict=True)
        ]
    about = {
        "rows": rows,
        "sequence": config.data.seq_len,
        "topk": config.model.indexer.topk,
        "heads": config.model.mla.num_attention_heads,
    }
    print(
        json.dumps(
            {"bench": "twilight"}
            | about
            | found
            | {"dtype": begin.model.dtype, "jax": version("jax")}
        )
    )


def measure(
    model: ModelConfig,
    weights: DecodeWeights,
    batch: dict[str, np.ndarray],
    stage: str,
    mass: float,
) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    """Means over counted tokens and layers; and what `read` says of the rows' loss."""
    layers, nats = jax.jit(functools.partial(read, model, stage=stage, mass=mass))(
        weights, {name: jnp.asarray(rows) for name, rows in batch.items()}
    )
    means = {name: round(float(jnp.mean(value)), 5) for name, value in layers.items()}
    return means | {
        "kept_by_layer": [round(float(kept), 2) for kept in layers["kept"]]
    }, jax.tree.map(np.asarray, nats)


def change(nats_B: np.ndarray, whole_B: np.ndarray, count_B: np.ndarray) -> dict[str, float]:
    """The loss a token, how far it is from that of reading every key, and how sure that is: rows
    are drawn, not tokens.
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
    model: ModelConfig, weights: DecodeWeights, batch: dict[str, Array], *, stage: str, mass: float
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Of each layer what it kept, means over the counted tokens [L]; of each row the loss of
    predicting from them, in nats, and their number [B].
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

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, LatentAttention) and context.method_name == "absorbed":
            out, more = watched(context.module, next_fun, *args, mass=mass, counted_BT=counted_BT)
            layers.append(more)
            return out
        return next_fun(*args, **kwargs)

    tokens = TokenInfo(positions_BT, segments_BT, stage, allowed_BTS, slot=jnp.int32(0))
    x_BTD = embed(model, weights.params["embedding"], tokens_BT)
    for kind, layer, past in zip(
        model.kinds, weights.layers, Cache.empty(model, B, T, stage, mass).layers, strict=True
    ):
        if weights.side_by_side:
            layer = with_experts(
                layer, functools.partial(expert_matrices, count=model.moe.num_experts)
            )
        with nn.intercept_methods(watch):
            x_BTD, _ = Block(model, kind).apply(layer, x_BTD, tokens, past)
    hidden_BTD = RMSNorm(model.rms_norm_eps, model.norm).apply(
        {"params": weights.params["final_norm"]}, x_BTD
    )
    logprobs_BTV = jax.nn.log_softmax(logits_of(model, weights.params, hidden_BTD[:, :-1]), axis=-1)
    nats_BT = -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    predicts_BT = counted_BT[:, :-1] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    of_rows = jnp.sum(nats_BT, axis=1, where=predicts_BT), jnp.sum(predicts_BT, axis=1)
    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}, of_rows


def watched(
    module: LatentAttention,
    absorbed,
    q_nope_BTNH,
    q_rope_BTNP,
    cache,
    allowed_BTS,
    query,
    *,
    mass: float,
    counted_BT: Array,
):
    """The layer's output, and of the keys it kept (of those selected, or without an indexer of all)
    their number, true and estimated mass, and its error.
    """
    out_BTNV = absorbed(q_nope_BTNH, q_rope_BTNP, cache, allowed_BTS, query)
    whole_BTNV = absorbed(
        q_nope_BTNH,
        q_rope_BTNP,
        cache.replace(attention_top_p=1.0, estimate=None),
        allowed_BTS,
        query,
    )
    q_BTNR = jnp.concatenate(
        [jnp.einsum("BTNH,RNH->BTNR", q_nope_BTNH, module.key_up), q_rope_BTNP], axis=-1
    )

    def probabilities(keys_BSR: Array, among_BTS: Array) -> Array:
        """Of each head [B, N, T, S]."""
        unnormalised_BNTS, sum_BNT1 = softmax_parts(
            jnp.einsum("BTNR,BSR->BNTS", q_BTNR, keys_BSR), among_BTS
        )
        return unnormalised_BNTS / sum_BNT1

    among_BTS = kept_BTS = allowed_BTS
    if query is not None:
        scores_BTS = indexer_scores(query.q_BTIC, cache.index_key_BSC, query.w_BTI)
        among_BTS = select_topk(scores_BTS, allowed_BTS, module.config.indexer.topk)
        kept_BTS = top_p_keys(scores_BTS, among_BTS, mass)
        estimated_BTS = jax.nn.softmax(
            jnp.where(among_BTS, scores_BTS, -jnp.inf), axis=-1, where=among_BTS
        )
    elif cache.estimate is not None:
        estimate_BSR = dequantise(cache.estimate, cache.latent_BSR.shape[-1])
        kept_BTS = keep_by_estimate(
            jnp.einsum("BTNR,BSR->BNTS", q_BTNR, estimate_BSR), allowed_BTS, mass, groups=1
        )[:, 0]
        estimated_BTS = jnp.mean(probabilities(estimate_BSR, among_BTS), axis=1)
    else:
        estimated_BTS = jnp.mean(probabilities(cache.latent_BSR, among_BTS), axis=1)
    true_BTS = jnp.mean(probabilities(cache.latent_BSR, among_BTS), axis=1)
    error_BT = jnp.linalg.norm(out_BTNV - whole_BTNV, axis=(-2, -1)) / jnp.linalg.norm(
        whole_BTNV, axis=(-2, -1)
    )
    return out_BTNV, {
        "kept": mean_over(jnp.sum(kept_BTS, axis=-1), counted_BT),
        "of": mean_over(jnp.sum(among_BTS, axis=-1), counted_BT),
        "true_mass": mean_over(jnp.sum(true_BTS, axis=-1, where=kept_BTS), counted_BT),
        "estimated_mass": mean_over(jnp.sum(estimated_BTS, axis=-1, where=kept_BTS), counted_BT),
        "output_error": mean_over(error_BT, counted_BT),
    }


def mean_over(x_BT: Array, counted_BT: Array) -> Array:
    return jnp.sum(x_BT, where=counted_BT) / jnp.sum(counted_BT)


if __name__ == "__main__":
    command(run, config="recorded", flags={"rows": Flag(64, "of held-out tokens")})
