"""Faults put into the kernels on purpose: what the tests of kernels look at must show each of
them.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import indexer_kl, sparse_attention, sparse_decode
from kernels.bitmask import nonempty_tiles, pack
from tests.interpreter import EAGER, STRICT, complaints
from tests.kernels import test_indexer_kl, test_sparse_decode
from tests.kernels.test_sparse_attention import computed_tiles, made, with_holes


def planted(monkeypatch, module, kernel: str, right: str, wrong: str) -> None:
    source = inspect.getsource(getattr(module, kernel))
    assert source.count(right) == 1
    monkeypatch.setattr(module, kernel, None)  # put back at the end of the test
    exec(source.replace(right, wrong), vars(module))


def results(interpret) -> list[jax.Array]:
    *qkv, among_BTS = made(1, 1, 1, 384, 8, 8)
    tiles = sparse_attention.Tiles(128, 128, 1, 128, 1, interpret=interpret)
    (out, lse), saved = sparse_attention._forward(*qkv, pack(among_BTS), tiles)
    return [
        out,
        lse,
        *sparse_attention._backward(tiles, saved, (jnp.ones_like(out), jnp.ones_like(lse)))[:3],
    ]


def losses(interpret):
    attention, indexer, among_BTS, some_BTS, _ = test_indexer_kl.made(1, 2, 384, 8, 1, 8, 0.5)
    return indexer_kl._with_gradients(
        attention,
        *indexer,
        pack(among_BTS),
        pack(some_BTS),
        indexer_kl.Tiles(128, 128, interpret),
        "",
    )


@pytest.mark.parametrize(
    ("module", "kernel", "right", "wrong"),
    [
        (
            sparse_attention,
            "_forward_kernel",
            "mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)",
            "pass",
        ),
        (
            sparse_attention,
            "_forward_kernel",
            "max_ref[...] = jnp.full(max_ref.shape, INITIAL_MAX, F32)",
            "pass",
        ),
        (
            sparse_attention,
            "_backward_kernel",
            "dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, F32)",
            "pass",
        ),
        (indexer_kl, "_kl_kernel", "sum_ref[...] = jnp.zeros(sum_ref.shape, F32)", "pass"),
        (indexer_kl, "_kl_kernel", "jnp.where(group == 0, 0.0, p_ref[...])", "p_ref[...]"),
    ],
    ids=[
        "out not zeroed",
        "largest not reset",
        "dk not zeroed",
        "the loss' sums not zeroed",
        "heads before the first",
    ],
)
def test_memory_used_before_it_is_written_is_seen(monkeypatch, module, kernel, right, wrong):
    planted(monkeypatch, module, kernel, right, wrong)
    monkeypatch.setattr("kernels.indexer_kl_calls.HEADS_AT_ONCE", 1)
    assert any(
        np.any(np.isnan(x))
        for x in jax.tree.leaves((results if module is sparse_attention else losses)(STRICT))
    )


@pytest.mark.parametrize(
    ("module", "kernel", "right"),
    [
        (sparse_attention, "_backward_kernel", "dq.fetch(i, visit).wait()"),
        (sparse_attention, "_backward_kernel", "dq.write_back(i, visits_ref[0] - 1).wait()"),
        (indexer_kl, "_kl_kernel", "fetched.wait()"),
        (indexer_kl, "_kl_kernel", "put.wait()"),
        (indexer_kl, "_kl_kernel", "fetched_row.wait()"),
        (indexer_kl, "_kl_kernel", "put_row.wait()"),
    ],
    ids=[
        "added to before it arrived",
        "left behind",
        "dk added to before it arrived",
        "dk fetched before it was put",
        "dq before it came",
        "dq left behind",
    ],
)
def test_a_copy_that_nobody_waits_for_is_seen(monkeypatch, capfd, caplog, module, kernel, right):
    planted(monkeypatch, module, kernel, right, "pass")
    assert "RACE DETECTED" in complaints(
        lambda: (results if module is sparse_attention else losses)(EAGER), capfd, caplog
    )


def test_a_latent_that_nobody_waits_for_is_seen(monkeypatch, capfd, caplog):
    real = pltpu.make_async_copy

    class Unawaited:
        def __init__(self, *args):
            self.args = args

        def start(self):
            real(*self.args).start()

        def wait(self):
            pass

    monkeypatch.setattr(sparse_decode.pltpu, "make_async_copy", Unawaited)
    q, latent, index, count = test_sparse_decode.inputs((23,), 2, 24)
    decoded = functools.partial(
        sparse_decode.decode_tpu,
        q,
        sparse_decode.to_tiles(latent),
        16,
        index,
        count,
        keys=test_sparse_decode.CHUNK,
        interpret=EAGER,
    )
    assert "RACE DETECTED" in complaints(decoded, capfd, caplog)


@pytest.mark.parametrize(
    ("at", "kernel", "place"),
    [(0, "_forward_kernel", "b, i, j"), (1, "_backward_kernel", "b, j, i")],
    ids=["forward", "backward"],
)
def test_a_tile_computed_in_vain_is_seen(monkeypatch, at, kernel, place):
    planted(
        monkeypatch,
        sparse_attention,
        kernel,
        f"nonempty_ref[{place}] != 0",
        f"nonempty_ref[{place}] >= 0",
    )
    *qkv, bits_BTW = with_holes()
    assert len(computed_tiles(monkeypatch, *qkv, bits_BTW)[at]) > np.sum(
        nonempty_tiles(bits_BTW, 128, 128)
    )


def test_two_places_for_three_copies_are_seen(monkeypatch, capfd, caplog):
    """A tile of dq that is fetched goes where one is still being put back from."""
    monkeypatch.setattr(sparse_attention, "DQ_TILES", 2)
    assert "RACE DETECTED" in complaints(lambda: results(EAGER), capfd, caplog)
