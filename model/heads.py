"""The two ends of the model: embedding and output head."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.layers.linear import linear
from model.sharding import constrain


def embed(config: ModelConfig, embedding_VD: Array, tokens_BT: Array) -> Array:
    with jax.named_scope("embed"):
        return constrain(
            jnp.take(embedding_VD, tokens_BT, axis=0).astype(config.dtype),
            "batch",
            "time",
            "hidden",
        )


def head_weights(config: ModelConfig, params) -> Array:
    return params["embedding"].T if config.tie_word_embeddings else params["head"]


def logits_of(config: ModelConfig, params, hidden_BTD: Array) -> Array:
    """[..., V] float32."""
    with jax.named_scope("output_head"):
        return linear(hidden_BTD, head_weights(config, params), output=jnp.float32)


def token_logprobs(
    config: ModelConfig, params, hidden_BTD: Array, targets_BT: Array, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution, [B, T] float32 in nats,
    without holding [B, T, V] when a row is longer than a chunk.

    The row is handled `config.logit_chunk` positions at a time; the backward pass recomputes their
    logits.
    """

    def chunk(hidden_BCD, targets_BC):
        logits_BCV = logits_of(config, params, hidden_BCD) / temperature
        logprobs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        entropy_BC = -jnp.sum(jnp.exp(logprobs_BCV) * logprobs_BCV, axis=-1)
        return jnp.take_along_axis(logprobs_BCV, targets_BC[..., None], axis=-1)[..., 0], entropy_BC

    B, T = targets_BT.shape
    size = min(config.logit_chunk, T)
    chunks = -(-T // size)
    if chunks == 1:
        return chunk(hidden_BTD, targets_BT)
    padding = chunks * size - T

    def cut(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, chunks, size, *x_BT.shape[2:]), 1, 0)

    body = functools.partial(jax.checkpoint, prevent_cse=False)(
        lambda _, piece: (None, chunk(*piece))
    )
    _, outputs = jax.lax.scan(body, None, (cut(hidden_BTD), cut(targets_BT)))
    return jax.tree.map(
        lambda x_nBC: jnp.moveaxis(x_nBC, 0, 1).reshape(B, chunks * size)[:, :T], outputs
    )
