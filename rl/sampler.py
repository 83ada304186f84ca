"""Sampling in the trainer's own program: one decode loop over the latent cache.

`start` reads prompts into a cache, `advance` draws one token a row and reads it, and these two make
both loops: `sample` runs wholly on the devices and records what it sampled from, `stream` hands
each token to the host as it is drawn.
"""

import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.cache import Cache
from model.config import ModelConfig
from model.decode import DecodeWeights, decode_step, decode_weights, prefill
from model.sharding import constrain
from rl.config import SamplingConfig


@flax.struct.dataclass
class Completions:
    """A batch of B completions of at most C tokens.

    tokens_BC: int32, the sampled ids; after a stop token, padding.
    mask_BC: bool, true on sampled tokens, the stop token included.
    logprobs_BC: float32, the log-probability of each at the sampling temperature, over the whole
      vocabulary; 0 outside the mask.
    """

    tokens_BC: Array
    mask_BC: Array
    logprobs_BC: Array


@flax.struct.dataclass
class DecodingState:
    """B rows in the middle of decoding.

    cache: what the model remembers of each row.
    logits_BV: float32, of the next token.
    length: int32 scalar, the tokens sampled so far.
    stopped_B: bool, the rows that have sampled a stop token.
    completions: what was sampled so far.
    """

    cache: Cache
    logits_BV: Array
    length: Array
    stopped_B: Array
    completions: Completions


def keep_likely(logprobs_BV: Array, top_k: int, top_p: float) -> Array:
    """Returns the mask [B, V] of top-k and nucleus sampling (arXiv 1904.09751).

    Kept are, of the top_k likeliest tokens (0: of all), the fewest whose probabilities add up to
    top_p of theirs. Ties are kept.
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


def draw(sampling: SamplingConfig, logits_BV: Array, keys_B: Array) -> tuple[Array, Array]:
    """Draws one token a row.

    Temperature 0 takes the likeliest token, and reports its log-probability at temperature 1.

    Returns:
      The tokens [B] and their log-probabilities [B] over the whole vocabulary.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV / (sampling.temperature or 1.0), axis=-1)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        keep_BV = keep_likely(logprobs_BV, sampling.top_k, sampling.top_p)
        kept_BV = jnp.where(keep_BV, logprobs_BV, -jnp.inf)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def start(
    config: ModelConfig,
    sampling: SamplingConfig,
    pad: int,
    variables: dict,
    prompts_PT: Array,
    segments_PT: Array,
    group: int = 1,
) -> DecodingState:
    """Reads P prompts, padded on the left (segment 0), for `group` completions of each.

    Row p * group + g is the g-th completion of prompt p.
    """
    C = sampling.max_new_tokens
    slots = prompts_PT.shape[1] + C
    cache, logits_PV = prefill(
        config,
        variables,
        prompts_PT,
        segments_PT,
        slots,
        sampling.attention,
        sampling.attention_top_p,
    )
    repeat = functools.partial(jnp.repeat, repeats=group, axis=0)
    cache = Cache(
        jax.tree.map(repeat, cache.layers),
        repeat(cache.segments_BS),
        repeat(cache.next_position_B),
        cache.length,
    )
    logits_BV = repeat(logits_PV)
    B = logits_BV.shape[0]
    nothing = Completions(
        jnp.full((B, C), pad, jnp.int32),
        jnp.zeros((B, C), bool),
        jnp.zeros((B, C), jnp.float32),
    )
    return DecodingState(cache, logits_BV, jnp.zeros((), jnp.int32), jnp.zeros((B,), bool), nothing)


def advance(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop: tuple[int, ...],
    pad: int,
    weights: DecodeWeights,
    keys_B: Array,
    state: DecodingState,
) -> DecodingState:
    """Draws the next token of each row, records it and reads it.

    A row that has stopped draws padding, and none of it is recorded.

    Args:
      stop: ids after which a row is complete.
      pad: id that fills the rest of a row.
      keys_B: a random key a row, for this token.
    """
    tokens_B, logprobs_B = draw(sampling, state.logits_BV, keys_B)
    live_B = ~state.stopped_B
    tokens_B = jnp.where(live_B, tokens_B, pad).astype(jnp.int32)
    column = Completions(tokens_B, live_B, jnp.where(live_B, logprobs_B, 0.0))
    completions = jax.tree.map(
        lambda all_BC, new_B: jax.lax.dynamic_update_slice_in_dim(
            all_BC, new_B[:, None], state.length, axis=1
        ),
        state.completions,
        column,
    )
    stops = jnp.asarray(stop, jnp.int32)
    stopped_B = state.stopped_B | jnp.any(tokens_B[:, None] == stops, axis=-1)
    cache, logits_BV = decode_step(config, weights, tokens_B, state.cache, sampling.attention)
    return DecodingState(cache, logits_BV, state.length + 1, stopped_B, completions)


def sample(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop: tuple[int, ...],
    pad: int,
    variables: dict,
    prompts_PT: Array,
    segments_PT: Array,
    keys_P: Array,
    group: int = 1,
) -> Completions:
    """Samples `group` completions of each prompt; row p * group + g is the g-th of prompt p.

    To be jitted with the first four arguments and `group` static. Each row draws with a key of the
    prompt's key and g alone, so what it samples does not depend on the other rows nor on its place
    among them. The loop ends early when every row has stopped.

    Args:
      stop, pad: as in `advance`.
      prompts_PT, segments_PT: prompts padded on the left (segment 0).
      keys_P: a random key a prompt, such as `keys_of` makes.
    """
    state = start(config, sampling, pad, variables, prompts_PT, segments_PT, group)
    rows = state.stopped_B.shape[0]
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys_B = fold(keys_P, jnp.arange(group)).reshape(rows)
    weights = decode_weights(config, variables, rows)

    def unfinished(state: DecodingState) -> Array:
        return (state.length < sampling.max_new_tokens) & ~jnp.all(state.stopped_B)

    def body(state: DecodingState) -> DecodingState:
        token_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.length)
        return advance(config, sampling, stop, pad, weights, token_keys_B, state)

    completions = jax.lax.while_loop(unfinished, body, state).completions
    return jax.tree.map(lambda x_BC: constrain(x_BC, "batch", "time"), completions)


def keys_of(key: Array, numbers: Sequence[int]) -> Array:
    """Returns a random key [P] for each of P prompts by its number, which alone decides it."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(numbers))


def stream(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop: tuple[int, ...],
    pad: int,
    variables: dict,
    prompts_PT: Array,
    segments_PT: Array,
    key: Array,
) -> Iterator[Array]:
    """Yields the tokens [P] of each position as they are sampled, until every row has stopped.

    All rows draw with the same key, so equal prompts have equal completions. The arguments are
    those of `sample`, which draws otherwise.
    """
    rows = prompts_PT.shape[0]
    state = _jitted_start(config, sampling, pad, variables, prompts_PT, segments_PT)
    weights = decode_weights(config, variables, rows)
    for position in range(sampling.max_new_tokens):
        keys_B = jnp.repeat(jax.random.split(jax.random.fold_in(key, position), 1), rows)
        state = _jitted_advance(config, sampling, stop, pad, weights, keys_B, state)
        yield jax.lax.dynamic_index_in_dim(
            state.completions.tokens_BC, position, axis=1, keepdims=False
        )
        if jnp.all(state.stopped_B):
            return


_jitted_start = jax.jit(start, static_argnums=(0, 1, 2))
# The state is donated: a token is written into the cache, and nothing of it is copied.
_jitted_advance = jax.jit(advance, static_argnums=(0, 1, 2, 3), donate_argnums=6)
