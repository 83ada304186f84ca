"""Sampling in the trainer's own program: one jitted prefill and decode loop over the latent cache,
with a record of what it sampled from.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.cache import Cache
from model.config import ModelConfig
from model.decode import decode_step, decode_weights, prefill
from model.sharding import constrain
from rl.config import SamplingConfig


@flax.struct.dataclass
class Completions:
    """A batch of B completions of at most C tokens.

    tokens_BC: sampled ids; after a stop token, pad.
    mask_BC: true on sampled tokens, the stop token included.
    logprobs_BC: log-probability, at the sampling temperature, over the whole vocabulary; 0 outside
    the mask.
    log_kept_BC: log of the probability that top-k and top-p left; what was sampled from is logprobs
    - log_kept.
    """

    tokens_BC: Array
    mask_BC: Array
    logprobs_BC: Array
    log_kept_BC: Array


def keep_likely(logprobs_BV: Array, top_k: int, top_p: float) -> Array:
    """The mask of top-k and nucleus sampling (arXiv 1904.09751): the top_k likeliest tokens, of
    those the fewest that together reach top_p. Ties are kept.
    """
    keep_BV = jnp.ones_like(logprobs_BV, dtype=bool)
    if 0 < top_k < logprobs_BV.shape[-1]:
        keep_BV &= logprobs_BV >= jax.lax.top_k(logprobs_BV, top_k)[0][:, -1:]
    if top_p < 1:
        probs_BV = jnp.where(keep_BV, jnp.exp(logprobs_BV), 0.0)
        probs_BV /= jnp.sum(probs_BV, axis=-1, keepdims=True)
        descending_BV = -jnp.sort(-probs_BV, axis=-1)
        before_BV = jnp.cumsum(descending_BV, axis=-1) - descending_BV
        least_B1 = jnp.min(
            jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True
        )
        keep_BV &= probs_BV >= least_B1
    return keep_BV


def draw(sampling: SamplingConfig, logits_BV: Array, keys_B: Array) -> tuple[Array, Array, Array]:
    """One token a row: (tokens_B, logprobs_B, log_kept_B). Temperature 0 takes the likeliest token
    and reports its log-probability at temperature 1.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV / (sampling.temperature or 1.0), axis=-1)
    keep_BV = keep_likely(logprobs_BV, sampling.top_k, sampling.top_p)
    kept_BV = jnp.where(keep_BV, logprobs_BV, -jnp.inf)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logprobs_BV, axis=-1)
    else:
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    pick = functools.partial(jnp.take_along_axis, indices=tokens_B[:, None], axis=-1)
    return tokens_B, pick(logprobs_BV)[:, 0], jax.nn.logsumexp(kept_BV, axis=-1)


def sample(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop: tuple[int, ...],
    pad: int,
    variables: dict,
    prompts_PT: Array,
    segments_PT: Array,
    key: Array,
    group: int = 1,
) -> Completions:
    """Samples `group` completions of each prompt; row p * group + g is the g-th of prompt p. To be
    jitted with the first four arguments and `group` static.

    Prompts are padded on the left (segment 0). Each row draws with its own key, so what it samples
    does not depend on the other rows. The loop ends early when every row has stopped.
    """
    C = sampling.max_new_tokens
    stage = sampling.attention
    cache, logits_PV = prefill(
        config,
        variables,
        prompts_PT,
        segments_PT,
        prompts_PT.shape[1] + C,
        stage,
        sampling.attention_top_p,
    )
    spread = functools.partial(jnp.repeat, repeats=group, axis=0)
    cache = Cache(
        jax.tree.map(spread, cache.layers),
        spread(cache.segments_BS),
        spread(cache.next_position_B),
        cache.length,
    )
    logits_BV = spread(logits_PV)
    B = logits_BV.shape[0]
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B))
    weights = decode_weights(config, variables, B)
    stops = jnp.asarray(stop, jnp.int32)

    def body(carry):
        at, done_B, logits_BV, cache, out = carry
        tokens_B, logprobs_B, log_kept_B = draw(
            sampling, logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, at)
        )
        live_B = ~done_B
        tokens_B = jnp.where(live_B, tokens_B, pad).astype(jnp.int32)
        row = Completions(
            tokens_B, live_B, jnp.where(live_B, logprobs_B, 0.0), jnp.where(live_B, log_kept_B, 0.0)
        )
        out = jax.tree.map(
            lambda all_BC, new_B: jax.lax.dynamic_update_slice_in_dim(
                all_BC, new_B[:, None], at, axis=1
            ),
            out,
            row,
        )
        done_B |= jnp.any(tokens_B[:, None] == stops, axis=-1)
        cache, logits_BV = decode_step(config, weights, tokens_B, cache, stage)
        return at + 1, done_B, logits_BV, cache, out

    def unfinished(carry):
        at, done_B, *_ = carry
        return (at < C) & ~jnp.all(done_B)

    zeros = jnp.zeros((B, C), jnp.float32)
    out = Completions(jnp.full((B, C), pad, jnp.int32), zeros.astype(bool), zeros, zeros)
    *_, out = jax.lax.while_loop(
        unfinished, body, (jnp.zeros((), jnp.int32), jnp.zeros((B,), bool), logits_BV, cache, out)
    )
    return jax.tree.map(lambda x_BC: constrain(x_BC, "batch", "time"), out)
