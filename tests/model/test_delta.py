"""Gated DeltaNet: the chunked form against the recurrent one, the recurrent one against the paper's
matrices, packing, and decoding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention.delta_rule import chunked_delta, recurrent_delta
from model.layers.delta import decay_biases, unit_length
from tests import tiny

B, N, H, V = 4, 3, 6, 5
chunked = jax.jit(chunked_delta, static_argnames="chunk")


def drawn(length: int):
    """Queries and keys of unit length, decays between 0.05 and 1, writing strengths over all of (0,
    1).
    """
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(B, length, N, *shape)), jnp.float32)

    q, k, v = unit_length(draw(H)) * H**-0.5, unit_length(draw(H)), draw(V)
    return q, k, v, -jnp.exp(draw()), jax.nn.sigmoid(2 * draw())


def test_recurrent_is_the_equation():
    """arXiv 2412.06464, eq. 10, one row and head by matrices: S_t = a S_{t-1} (I - b k k^T) + b v
    k^T, S being V x H there.
    """
    q, k, v, log_a, b = (np.asarray(x, np.float64)[1, :, 2] for x in drawn(12))
    S, expected = np.zeros((V, H)), []
    for t in range(12):
        S = np.exp(log_a[t]) * S @ (np.eye(H) - b[t] * np.outer(k[t], k[t])) + b[t] * np.outer(
            v[t], k[t]
        )
        expected.append(S @ q[t])
    found, state_BNHV = recurrent_delta(*drawn(12), jnp.zeros((B, N, H, V)))
    np.testing.assert_allclose(found[1, :, 2], expected, atol=1e-5)
    np.testing.assert_allclose(state_BNHV[1, 2].T, S, atol=1e-5)


@pytest.mark.parametrize(("length", "chunk"), [(128, 64), (70, 64), (33, 8), (5, 64), (1, 8)])
def test_chunked_is_recurrent(length, chunk):
    """To 1e-5 in float32, values, last state and every gradient; with a state to begin with.
    Lengths that chunks divide and that they do not.
    """
    inputs = (*drawn(length), jax.random.normal(jax.random.key(1), (B, N, H, V)))
    ones_BT = jnp.ones((B, length), jnp.int32)

    def loss(form, *inputs):
        o_BTNV, state_BNHV = form(*inputs)
        return jnp.sum(jnp.sin(o_BTNV)) + jnp.sum(jnp.cos(state_BNHV)), (o_BTNV, state_BNHV)

    def both(form):
        return jax.jit(
            jax.value_and_grad(functools.partial(loss, form), argnums=range(6), has_aux=True)
        )(*inputs)

    def by_chunks(q, k, v, log_a, b, state):
        return chunked_delta(q, k, v, log_a, b, ones_BT, state, chunk)

    found = both(by_chunks)
    expected = both(recurrent_delta)
    tiny.assert_close(found[0][1], expected[0][1], atol=1e-5)
    tiny.assert_close(found[1], expected[1], atol=1e-4)  # sums over up to 128 tokens


@pytest.mark.heavy
def test_packed_is_separate():
    """Each segment of a packed row by itself, from an empty state; padding changes nothing and
    reads zeros; the last state is the last segment's.
    """
    (q, k, v, log_a, b), batch = drawn(tiny.T), tiny.batch_of()
    real_BT1 = batch["segments"][..., None] > 0
    inputs = q, k, v, jnp.where(real_BT1, log_a, 0.0), jnp.where(real_BT1, b, 0.0)
    empty = jnp.zeros((B, N, H, V))
    for chunk in (4, 8, 64):
        o_BTNV, state_BNHV = chunked(*inputs, batch["segments"], empty, chunk=chunk)
        for row, spans in enumerate(tiny.LAYOUT):
            at, last = 0, empty[0]
            for segment, length in spans:
                segment_inputs = jax.tree.map(
                    lambda x, at=at, row=row, length=length: x[row : row + 1, at : at + length],
                    inputs,
                )
                alone, after = recurrent_delta(*segment_inputs, state_BNHV=empty[:1])
                expected = alone[0] if segment else jnp.zeros_like(alone[0])
                last = after[0] if segment else last
                tiny.assert_close(o_BTNV[row, at : at + length], expected, atol=1e-5)
                at += length
            tiny.assert_close(state_BNHV[row], last, atol=1e-5)


def test_decays_too_strong_for_float32_are_no_nan():
    """A chunk over which the state decays to nothing: exp of the sum underflows, and its inverse
    must not be needed.
    """
    q, k, v, log_a, b = drawn(64)
    inputs = q, k, v, jnp.full_like(log_a, -30.0), b
    empty, ones_BT = jnp.zeros((B, N, H, V)), jnp.ones((B, 64), jnp.int32)
    value, gradients = jax.value_and_grad(
        lambda *x: jnp.sum(chunked_delta(*x, segments_BT=ones_BT, state_BNHV=empty, chunk=64)[0]),
        argnums=range(5),
    )(*inputs)
    tiny.assert_close((value, gradients), (value, gradients))
    tiny.assert_close(
        chunked(*inputs, ones_BT, empty, chunk=64)[0], recurrent_delta(*inputs, empty)[0], atol=1e-6
    )


def test_decays_begin_slow():
    """softplus of the bias is log-uniform between 1e-3 and 1e-1 (the authors' code)."""
    step = jax.nn.softplus(decay_biases(jax.random.key(0), (4000,), jnp.float32))
    assert float(step.min()) > 0.99e-3 and float(step.max()) < 1.01e-1
    np.testing.assert_allclose(float(jnp.mean(jnp.log(step))), np.log(1e-2), atol=0.08)
