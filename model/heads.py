"""The two ends of the model: embedding and output head."""

import jax
import jax.numpy as jnp
from jax import Array

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
) -> tuple[Array, Array]:
    """Computes each target's log-probability and its distribution's entropy, in nats.

    A row is handled `config.logit_chunk` positions at a time, so that no [B, T, V] lives when a row
    is longer; the backward pass recomputes a chunk's logits.

    Args:
      params: the model's, for the output head.
      hidden_BTD: normalised hidden states.
      targets_BT: the tokens that are predicted.
      temperature: divides the logits.

    Returns: logprobs_BT and entropy_BT, float32.
    """

    def chunk_logprobs(hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
        logits_BTV = logits_of(config, params, hidden_BTD) / temperature
        logprobs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)
        return jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0], entropy_BT

    T = targets_BT.shape[1]
    if config.logit_chunk >= T:
        return chunk_logprobs(hidden_BTD, targets_BT)
    return map_chunks(chunk_logprobs, (hidden_BTD, targets_BT), config.logit_chunk, checkpoint=True)
