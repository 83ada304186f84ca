"""Faults are put into the kernels, and the properties that their tests look at show each of them.

The faults are found in the kernels as they are: every wait for a copy, every first write to memory
that a kernel adds to, and wrong functions and constants in place of the right ones. They test the
tests, so the long ones wait for `make test-all`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import indexer_kl, indexer_kl_calls, indexer_kl_kernel, sparse_attention, sparse_decode
from kernels.bitmask import nonempty_tiles, pack
from tests.interpreter import (
    EAGER_AND_SURE,
    STRICT,
    complaints,
    untraced,
    watch_refs,
    watch_waits,
)
from tests.kernels import test_indexer_kl, test_sparse_decode
from tests.kernels.test_sparse_attention import computed_tiles, made, with_holes


def attend(interpret, T: int):
    """Returns (out, lse) of T / 128 tiles of queries and keys, and what the backward pass needs."""
    q, k, v, selected_BTS = made(1, 1, 1, T, 8, 8)
    tiles = sparse_attention.Tiles(128, 128, 1, 128, 1, interpret=interpret)
    return sparse_attention._forward(q, k, v, pack(selected_BTS), tiles), tiles


def attention(interpret, T: int = 256) -> list[jax.Array]:
    """Returns out and lse."""
    (results, _), _ = attend(interpret, T)
    return list(results)


def attention_gradients(interpret, T: int = 256) -> list[jax.Array]:
    """Returns out, lse, dq, dk and dv."""
    ((out, lse), saved), tiles = attend(interpret, T)
    cotangents = jnp.ones_like(out), jnp.ones_like(lse)
    return [out, lse, *sparse_attention._backward(tiles, saved, cotangents)[:3]]


def loss(interpret, T: int = 256) -> list[jax.Array]:
    """Returns the indexer's loss, the attention of the selected keys, and the gradients."""
    given, indexer, allowed_BTS, selected_BTS, _ = test_indexer_kl.made(1, 2, T, 8, 1, 8, 0.5)
    allowed_BTW, selected_BTW = pack(allowed_BTS), pack(selected_BTS)
    tiles = indexer_kl.Tiles(128, 128, interpret)
    return jax.tree.leaves(
        indexer_kl._value_and_gradients(given, *indexer, allowed_BTW, selected_BTW, tiles, "")
    )


def decode(interpret) -> list[jax.Array]:
    """Returns attention over two chunks of listed latents."""
    q, latent, index, count = test_sparse_decode.inputs((23,), 2, 24)
    return [
        sparse_decode.decode_tpu(
            q,
            sparse_decode.to_tiles(latent),
            16,
            index,
            count,
            keys=test_sparse_decode.CHUNK,
            interpret=interpret,
        )
    ]


KERNELS = {
    "attention": (attention, sparse_attention, sparse_attention._forward_kernel),
    "its gradients": (attention_gradients, sparse_attention, sparse_attention._backward_kernel),
    "the indexer's normaliser": (loss, indexer_kl_calls, indexer_kl_calls.normaliser_kernel),
    "the indexer's loss": (loss, indexer_kl_calls, indexer_kl_calls.kl_kernel),
    "decoding": (decode, sparse_decode, sparse_decode._kernel),
}
# References that are written first: once behind the last tile, or before a row of tiles is added.
FIRST_WRITES = {
    "attention": 5,
    "its gradients": 4,
    "the indexer's normaliser": 3,
    "the indexer's loss": 7,
    "decoding": 4,
}
# Waits, and how many tokens it takes until what each one guards is used again.
WAITS = {"its gradients": (3, 512), "the indexer's loss": (4, 384), "decoding": (2, None)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_memory_used_before_it_is_written_is_seen(monkeypatch, name):
    """NaN is in it, and in the results or in a comparison that they depend on."""
    compute, module, kernel = KERNELS[name]
    with monkeypatch.context() as watching:
        uses, right = watch_refs(watching, module, kernel), compute(STRICT)
    written = [number for number, use in enumerate(uses) if use == "write"]
    assert len(written) >= FIRST_WRITES[name]
    for number in written:
        with monkeypatch.context() as faulty:
            watch_refs(faulty, module, kernel, skipped=number)
            wrong = compute(STRICT)
        assert not all(map(np.array_equal, wrong, right)), f"reference {number}: no NaN anywhere"


def test_sums_over_groups_of_heads_that_begin_with_unwritten_memory_are_seen(monkeypatch):
    monkeypatch.setattr(indexer_kl_calls, "HEADS_AT_ONCE", 1)
    assert not any(np.any(np.isnan(x)) for x in loss(STRICT))
    monkeypatch.setattr(indexer_kl_kernel, "_earlier_heads", lambda p_ref, group: p_ref[...])
    assert any(np.any(np.isnan(x)) for x in loss(STRICT))


@pytest.mark.slow
@pytest.mark.parametrize("name", WAITS)
def test_a_copy_that_nobody_waits_for_is_seen(monkeypatch, capfd, caplog, name):
    (compute, module, kernel), (count, tokens) = KERNELS[name], WAITS[name]
    given = [tokens] if tokens else []
    untraced(monkeypatch, module, kernel)
    with monkeypatch.context() as watching:
        waits = watch_waits(watching)
        assert "RACE" not in complaints(lambda: compute(EAGER_AND_SURE, *given), capfd, caplog)
    places = list(dict.fromkeys(waits))
    assert len(places) >= count
    for place in places:
        untraced(monkeypatch, module, kernel)
        with monkeypatch.context() as faulty:
            watch_waits(faulty, skipped=place)
            assert "RACE DETECTED" in complaints(
                lambda: compute(EAGER_AND_SURE, *given), capfd, caplog
            ), place


def test_two_slots_for_three_copies_are_seen(monkeypatch, capfd, caplog):
    """A tile of dq that is fetched goes where one is still being put back from."""
    monkeypatch.setattr(sparse_attention, "DQ_TILES", 2)
    untraced(monkeypatch, sparse_attention, sparse_attention._backward_kernel)
    assert "RACE DETECTED" in complaints(
        lambda: attention_gradients(EAGER_AND_SURE, 384), capfd, caplog
    )


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
def test_a_tile_computed_in_vain_is_seen(monkeypatch, direction):
    q, k, v, bits_BTW = with_holes()
    nonempty_Bnm = nonempty_tiles(bits_BTW, 128, 128)

    def every_tile(bits_BTW, queries, keys):
        return jnp.ones_like(nonempty_tiles(bits_BTW, queries, keys))

    monkeypatch.setattr(sparse_attention, "nonempty_tiles", every_tile)
    computed = computed_tiles(monkeypatch, q, k, v, bits_BTW)[direction]
    assert len(computed) > np.sum(nonempty_Bnm)
