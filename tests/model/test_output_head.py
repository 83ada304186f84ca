"""The output head in chunks is the output head: values, gradients, and against numpy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.heads import token_logprobs
from tests import tiny

CONFIG = tiny.model_config(num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def inputs():
    """(head, hidden, targets)."""
    rng = np.random.default_rng(0)
    draw = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((CONFIG.hidden_size, tiny.VOCAB), (3, 10, CONFIG.hidden_size))
    )
    return *draw, jnp.asarray(rng.integers(0, tiny.VOCAB, (3, 10)))


def chunked_loss(chunk, head, hidden_BTD, targets_BT):
    config = dataclasses.replace(CONFIG, logit_chunk=chunk)

    def loss(head, hidden_BTD):
        logprobs_BT, entropy_BT = token_logprobs(
            config, {"head": head}, hidden_BTD, targets_BT, 0.7
        )
        return jnp.sum(logprobs_BT * jnp.arange(10)) + jnp.sum(entropy_BT**2), (
            logprobs_BT,
            entropy_BT,
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(head, hidden_BTD)


@pytest.mark.parametrize("chunk", [5, 4, 1])
def test_chunks_change_nothing(inputs, chunk):
    """Two, three of which the last is ragged, ten: only gradients to the head are summed in another
    order.
    """
    tiny.assert_close(
        chunked_loss(chunk, *inputs), chunked_loss(1024, *inputs), rtol=1e-5, atol=1e-4
    )


def test_against_numpy(inputs):
    """In float64, at temperature 0.7; float32 logits of size 10 keep 1e-6 of that."""
    head, hidden_BTD, targets_BT = (np.asarray(x) for x in inputs)
    (_, (logprobs_BT, entropy_BT)), _ = chunked_loss(4, *inputs)
    logits_BTV = hidden_BTD.astype(np.float64) @ head / 0.7
    probs_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    probs_BTV /= probs_BTV.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        logprobs_BT,
        np.log(np.take_along_axis(probs_BTV, targets_BT[..., None], -1))[..., 0],
        atol=2e-5,
    )
    np.testing.assert_allclose(entropy_BT, -(probs_BTV * np.log(probs_BTV)).sum(-1), atol=2e-5)


def test_tied_head_is_the_embedding(inputs):
    head, hidden_BTD, targets_BT = inputs
    tied = token_logprobs(
        dataclasses.replace(CONFIG, tie_word_embeddings=True),
        {"embedding": head.T},
        hidden_BTD,
        targets_BT,
    )
    chex.assert_trees_all_equal(
        tied, token_logprobs(CONFIG, {"head": head}, hidden_BTD, targets_BT)
    )
