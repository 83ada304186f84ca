"""The two ends of the model: embedding and output head."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.bitmask import unpack
from kernels.chunks import map_chunks
from model.config import ModelConfig
from model.layers.linear import linear
from model.sharding import constrain


def embed(config: ModelConfig, embedding_VD: Array, tokens_BT: Array) -> Array:
    """Looks tokens up in the embedding: [B, T, D] in the compute type."""
    with jax.named_scope("embed"):
        # Every device looks whole rows up. Rows cut by channel would have to be laid out anew by
        # batch, which the compiler cannot do without making all of them on every device.
        table_VD = constrain(embedding_VD, "vocab", "hidden")
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(config.dtype)
        return constrain(x_BTD, "batch", "time", "hidden")


def head_weights(config: ModelConfig, params: dict) -> Array:
    """Returns the output head's matrix [D, V]: the embedding transposed where they are tied."""
    return params["embedding"].T if config.tie_word_embeddings else params["head"]


def logits_of(config: ModelConfig, params: dict, hidden_BTD: Array) -> Array:
    """Computes the logits [..., V] of hidden states [..., D], in float32."""
    with jax.named_scope("output_head"):
        return linear(hidden_BTD, head_weights(config, params), output=jnp.float32)


def token_logprobs(
    config: ModelConfig,
    params: dict,
    hidden_BTD: Array,
    targets_BT: Array,
    temperature: float = 1.0,
    support_BTW: Array | None = None,
) -> tuple[Array, Array]:
    """Computes each target's log-probability and its distribution's entropy, in nats.

    With a support the log-probability is that of the distribution over it,

        log p(target) - log sum of p over the support

    with gradients through the sum, which is what a token was drawn from by top-k or top-p
    ("keep sampling mask", DeepSeek-V3.2, arXiv 2512.02556, section 3.1). The entropy is that of
    the whole distribution.

    A row is handled `config.logit_chunk` positions at a time, so that no [B, T, V] lives when a row
    is longer; the backward pass recomputes a chunk's logits.

    Args:
      params: the model's, for the output head.
      hidden_BTD: normalised hidden states.
      targets_BT: the tokens that are predicted.
      temperature: divides the logits.
      support_BTW: the ids that each target was drawn from, a bitmask (kernels/bitmask.py), the
        target among them; where none is set, of all. None: all of all.

    Returns: logprobs_BT and entropy_BT, float32.
    """

    def chunk_logprobs(
        hidden_BTD: Array, targets_BT: Array, support_BTW: Array | None
    ) -> tuple[Array, Array]:
        logits_BTV = logits_of(config, params, hidden_BTD) / temperature
        logprobs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)
        chosen_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]
        if support_BTW is not None:
            chosen_BT -= log_share(logprobs_BTV, support_BTW)
        return chosen_BT, entropy_BT

    T = targets_BT.shape[1]
    if config.logit_chunk >= T:
        return chunk_logprobs(hidden_BTD, targets_BT, support_BTW)
    given = hidden_BTD, targets_BT, support_BTW
    return map_chunks(chunk_logprobs, given, config.logit_chunk, checkpoint=True)


def log_share(logprobs_BTV: Array, support_BTW: Array) -> Array:
    """Returns the logarithm of the share of probability that supports have, [B, T].

    Args:
      support_BTW: bitmasks of ids; one in which none is set stands for all, whose share is 1.
    """
    kept_BTV = unpack(support_BTW, logprobs_BTV.shape[-1])
    some_BT = jnp.any(support_BTW != 0, axis=-1)
    kept_BTV |= ~some_BT[..., None]
    log_share_BT = jax.nn.logsumexp(jnp.where(kept_BTV, logprobs_BTV, -jnp.inf), axis=-1)
    return jnp.where(some_BT, log_share_BT, 0.0)
