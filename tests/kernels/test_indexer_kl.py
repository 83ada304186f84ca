"""The indexer's KL by tiles has the values and gradients of the dense definition.

The kernels run in Pallas' TPU interpreter, which fills memory with NaN and watches for races; the
gradients are compared with autodiff, over all keys (the warm-up stage) and over selected ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import indexer_kl as kernels
from kernels.bitmask import pack
from kernels.indexer_kl import MainAttention, Tiles, total_kl_reference, total_kl_tpu
from kernels.reference import indexer_kl, indexer_scores
from tests.interpreter import STRICT

pytestmark = pytest.mark.usefixtures("no_races")


def made(B: int, N: int, T: int, H: int, I: int, C: int, share: float):
    """Makes the attention's inputs; the indexer's q, k and w; a mask, a part of it; and p.

    The mask is causal, with two segments and a query without keys.
    """
    rng = np.random.default_rng(0)
    shapes = (B, N, T, H), (B, N, T, H), (B, T, I, C), (B, T, I), (B, T, C)
    q_BNTH, k_BNSH, q_BTIC, w_BTI, k_BSC = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes
    )
    allowed_BTS = np.tril(rng.random((B, T, T)) < share)
    allowed_BTS[:, T // 2 :, : T // 2] = False
    allowed_BTS[:, 5] = False
    selected_BTS = jnp.asarray(allowed_BTS & (rng.random((B, T, T)) < 0.3))
    allowed_BTS = jnp.asarray(allowed_BTS)
    logits_BNTS = jnp.where(
        allowed_BTS[:, None],
        jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, precision="highest"),
        -1e30,
    )
    lse_BNT = jnp.where(
        jnp.any(allowed_BTS, axis=-1)[:, None], jax.nn.logsumexp(logits_BNTS, axis=-1), 0.0
    )
    p_BTS = jnp.mean(
        jnp.where(allowed_BTS[:, None], jnp.exp(logits_BNTS - lse_BNT[..., None]), 0), axis=1
    )
    return (
        MainAttention(q_BNTH, k_BNSH, lse_BNT),
        (q_BTIC, k_BSC, w_BTI),
        allowed_BTS,
        selected_BTS,
        p_BTS,
    )


@pytest.mark.parametrize(
    ("shape", "share", "tiles", "heads"),
    [
        ((1, 3, 200, 24, 2, 16), 1.0, Tiles(128, 128), 32),  # all keys: the warm-up
        ((2, 1, 280, 8, 3, 8), 0.2, Tiles(128, 256), 32),  # selected ones, one head
        # Heads come three by three, and tiles without a key before and behind others.
        ((1, 6, 300, 8, 1, 8), 0.1, Tiles(128, 128), 4),
    ],
    ids=["warm-up", "sparse", "groups of heads"],
)
@pytest.mark.parametrize("kind", ["kernel", "reference"])
def test_it_is_the_definition_and_its_gradient(
    shape: tuple[int, int, int, int, int, int], share, tiles, heads, kind, monkeypatch
):
    monkeypatch.setattr("kernels.indexer_kl.KEYS_AT_ONCE", tiles.keys)  # two calls or three
    monkeypatch.setattr("kernels.indexer_kl_calls.HEADS_AT_ONCE", heads)
    attention, indexer, allowed_BTS, selected_BTS, p_BTS = made(*shape, share)
    total_kl = {
        "kernel": functools.partial(total_kl_tpu, tiles=tiles._replace(interpret=STRICT)),
        "reference": functools.partial(total_kl_reference, queries=64),
    }[kind]
    with jax.default_matmul_precision("highest"):
        definition = jax.value_and_grad(
            lambda q, k, w: 3.0 * jnp.sum(indexer_kl(p_BTS, indexer_scores(q, k, w), allowed_BTS)),
            (0, 1, 2),
        )
        expected, expected_gradients = definition(*indexer)

        def three_times(q_BTIC, k_BSC, w_BTI):
            allowed_BTW, selected_BTW = pack(allowed_BTS), pack(selected_BTS)
            kl, recall_BT = total_kl(attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW)
            return 3.0 * kl, recall_BT

        (found, recall_BT), gradients = jax.value_and_grad(three_times, (0, 1, 2), has_aux=True)(
            *indexer
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        recall_BT, jnp.sum(jnp.where(selected_BTS, p_BTS, 0.0), axis=-1), atol=1e-5
    )
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def test_keys_outside_the_set_may_have_any_logit():
    """Their exponentials overflow: the log-sum-exp does not count them."""
    attention, indexer, allowed_BTS, selected_BTS, _ = made(1, 2, 130, 8, 1, 8, 0.3)
    q_BNTH, k_BNSH = (
        x.at[..., 0].set(0).at[:, :, at, 0].set(1e4)
        for x, at in ((attention.q_BNTH, 100), (attention.k_BNSH, 50))
    )
    allowed_BTS, selected_BTS = (
        allowed_BTS.at[:, 100, 50].set(False),
        selected_BTS.at[:, 100, 50].set(False),
    )
    given = (
        attention._replace(q_BNTH=q_BNTH, k_BNSH=k_BNSH),
        *indexer,
        pack(allowed_BTS),
        pack(selected_BTS),
    )
    expected, recall_BT = total_kl_reference(*given)
    found, found_recall_BT = total_kl_tpu(*given, Tiles(128, 128, interpret=True))
    assert np.isfinite(found)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found_recall_BT, recall_BT, atol=1e-5)


def test_rows_whose_tables_do_not_fit_come_one_by_one(monkeypatch):
    attention, indexer, allowed_BTS, selected_BTS, _ = made(2, 1, 200, 8, 1, 8, 0.5)

    def graded():
        def total(q_BTIC, k_BSC, w_BTI):
            allowed_BTW, selected_BTW = pack(allowed_BTS), pack(selected_BTS)
            tiles = Tiles(128, 128, interpret=True)
            return total_kl_tpu(attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW, tiles)

        (kl, recall_BT), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*indexer)
        return recall_BT, *gradients, kl

    *at_once, kl = graded()
    monkeypatch.setattr("kernels.tiles.TABLE_BYTES", 8 * 4)
    called, loss = [], kernels.loss_and_gradients
    monkeypatch.setattr(
        kernels,
        "loss_and_gradients",
        lambda tables, *given: called.append(tables[0].shape[0]) or loss(tables, *given),
    )
    *one_by_one, same_kl = graded()
    assert set(called) == {1}
    np.testing.assert_allclose(
        same_kl, kl, rtol=1e-6
    )  # the same 400 numbers, summed in another order
    for one, other in zip(one_by_one, at_once, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_is_float32_but_for_the_rounding_of_products(monkeypatch):
    """The reference takes the same numbers in float32; there are two groups of heads and two chunks
    of keys. Products of bfloat16 are exact and their sums float32's, so the loss is as exact as
    float32's. A gradient's terms have one factor that was rounded, dI w or relu(q k), and the
    gradients of q and w or k are rounded once more at their end: each by 2^-9 of itself at most.
    """
    monkeypatch.setattr("kernels.indexer_kl_calls.HEADS_AT_ONCE", 2)
    monkeypatch.setattr("kernels.indexer_kl.KEYS_AT_ONCE", 128)
    (q_BNTH, k_BNSH, _), indexer, allowed_BTS, selected_BTS, _ = made(1, 4, 200, 8, 2, 8, 0.5)
    attended = q_BNTH.astype(jnp.bfloat16), k_BNSH.astype(jnp.bfloat16)
    q_BTIC, k_BSC = indexer[0].astype(jnp.bfloat16), indexer[1].astype(jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in attended)
    logits_BNTS = jnp.where(
        allowed_BTS[:, None], jnp.einsum("BNTH,BNSH->BNTS", *exact, precision="highest"), -1e30
    )
    lse_BNT = jnp.where(
        jnp.any(allowed_BTS, axis=-1)[:, None], jax.nn.logsumexp(logits_BNTS, axis=-1), 0.0
    )

    def graded(total_kl, attended, q_BTIC, k_BSC):
        attention = MainAttention(attended[0], attended[1], lse_BNT)

        def total(q_BTIC, k_BSC, w_BTI):
            return total_kl(attention, q_BTIC, k_BSC, w_BTI, pack(allowed_BTS), pack(selected_BTS))

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q_BTIC, k_BSC, indexer[2])

    (found, recall_BT), gradients = graded(
        functools.partial(total_kl_tpu, tiles=Tiles(128, 128, interpret=STRICT)),
        attended,
        q_BTIC,
        k_BSC,
    )
    with jax.default_matmul_precision("highest"):
        exact_indexer = (x.astype(jnp.float32) for x in (q_BTIC, k_BSC))
        (expected, expected_recall_BT), expected_gradients = graded(
            total_kl_reference, exact, *exact_indexer
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(recall_BT, expected_recall_BT, atol=1e-5)
    for one, other, given in zip(
        gradients, expected_gradients, (q_BTIC, k_BSC, indexer[2]), strict=True
    ):
        assert one.dtype == given.dtype
        np.testing.assert_allclose(
            one.astype(jnp.float32), other, atol=2 * 2**-9 * float(jnp.max(jnp.abs(other)))
        )


def test_two_cores_do_not_race():
    """Sequences lie over the two cores of a chip, and in the normaliser blocks of queries too."""
    attention, indexer, allowed_BTS, selected_BTS, _ = made(2, 1, 200, 8, 1, 8, 0.5)
    given = attention, *indexer, pack(allowed_BTS), pack(selected_BTS)
    two_cores = dataclasses.replace(STRICT, num_cores_or_threads=2)
    results = [
        kernels._value_and_gradients(*given, Tiles(128, 128, interpret), "")
        for interpret in (STRICT, two_cores)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
    "kind",
    [functools.partial(total_kl_tpu, tiles=Tiles(128, 128, interpret=True)), total_kl_reference],
    ids=["kernel", "reference"],
)
def test_nothing_reaches_the_attention(kind):
    attention, indexer, allowed_BTS, selected_BTS, _ = made(1, 1, 128, 8, 1, 8, 0.5)
    gradients = jax.grad(
        lambda attention: kind(attention, *indexer, pack(allowed_BTS), pack(selected_BTS))[0]
    )(attention)
    assert not any(np.any(gradient) for gradient in gradients)
