"""The output head in chunks is the output head: values, gradients, and against numpy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bitmask import pack_on_host
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


@pytest.fixture(scope="module")
def supports(inputs):
    """Ids that each target was drawn from, itself among them; all for the first of each row."""
    rng, targets_BT = np.random.default_rng(1), np.asarray(inputs[2])
    kept_BTV = rng.random((3, 10, tiny.VOCAB)) < 0.2
    np.put_along_axis(kept_BTV, targets_BT[..., None], True, axis=-1)
    kept_BTV[:, 0] = True
    return kept_BTV


def words_of(kept_BTV):
    """As a bitmask, in which none is set where all are kept."""
    some_BTV = kept_BTV & ~kept_BTV.all(axis=-1, keepdims=True)
    row, ids = np.nonzero(some_BTV.reshape(-1, tiny.VOCAB))
    return pack_on_host(row, ids, 30, tiny.VOCAB).reshape(3, 10, -1)


@functools.partial(jax.jit, static_argnums=0)
def supported_loss(chunk, head, hidden_BTD, targets_BT, support_BTW):
    config = dataclasses.replace(CONFIG, logit_chunk=chunk)

    def loss(head, hidden_BTD):
        logprobs_BT, entropy_BT = token_logprobs(
            config, {"head": head}, hidden_BTD, targets_BT, 0.7, support_BTW
        )
        return jnp.sum(logprobs_BT * jnp.arange(10)), (logprobs_BT, entropy_BT)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(head, hidden_BTD)


def loop_over_supports(head, hidden_BTD, targets_BT, kept_BTV):
    """log p - log sum of p over the support, target by target in float64, [B, T]."""
    logprobs_BT = np.zeros(targets_BT.shape)
    for b, t in np.ndindex(*targets_BT.shape):
        logits_V = hidden_BTD[b, t].astype(np.float64) @ head.astype(np.float64) / 0.7
        probs_V = np.exp(logits_V) / sum(np.exp(logit) for logit in logits_V)
        share = sum(prob for prob, kept in zip(probs_V, kept_BTV[b, t], strict=True) if kept)
        logprobs_BT[b, t] = np.log(probs_V[targets_BT[b, t]] / share)
    return logprobs_BT


def test_over_a_support_against_a_loop(inputs, supports):
    """Values, and gradients by central differences; the entropy is that of the whole."""
    head, hidden_BTD, targets_BT = (np.asarray(x) for x in inputs)
    (_, (logprobs_BT, entropy_BT)), grads = supported_loss(1024, *inputs, words_of(supports))
    np.testing.assert_allclose(
        logprobs_BT, loop_over_supports(head, hidden_BTD, targets_BT, supports), atol=2e-5
    )
    (_, (whole_BT, whole_entropy_BT)), _ = chunked_loss(1024, *inputs)
    np.testing.assert_allclose(logprobs_BT[:, 0], whole_BT[:, 0], atol=1e-6)
    np.testing.assert_allclose(entropy_BT, whole_entropy_BT, atol=1e-6)

    def total(head, hidden_BTD):
        return np.sum(loop_over_supports(head, hidden_BTD, targets_BT, supports) * np.arange(10))

    step = 1e-5
    for place in ((0, 3), (5, 7), (11, int(targets_BT[0, 4]))):
        move = np.zeros(head.shape)
        move[place] = step
        slope = (total(head + move, hidden_BTD) - total(head - move, hidden_BTD)) / (2 * step)
        np.testing.assert_allclose(grads[0][place], slope, rtol=1e-4, atol=1e-3)  # of size 10
    for place in ((0, 0, 1), (1, 4, 9), (2, 9, 30)):
        move = np.zeros(hidden_BTD.shape)
        move[place] = step
        slope = (total(head, hidden_BTD + move) - total(head, hidden_BTD - move)) / (2 * step)
        np.testing.assert_allclose(grads[1][place], slope, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [4, 1])
def test_supports_in_chunks_change_nothing(inputs, supports, chunk):
    support_BTW = words_of(supports)
    tiny.assert_close(
        supported_loss(chunk, *inputs, support_BTW),
        supported_loss(1024, *inputs, support_BTW),
        rtol=1e-5,
        atol=1e-4,
    )


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
