"""Faults put into the kernels on purpose: what tests/model/test_sparse_attention.py looks at must show each of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import sparse_attention
from model.kernels.keyset import held_tiles, pack
from tests.model.test_sparse_attention import EAGER, STRICT, computed_tiles, made, with_holes


def planted(monkeypatch, kernel: str, right: str, wrong: str) -> None:
    source = inspect.getsource(getattr(sparse_attention, kernel))
    assert source.count(right) == 1
    monkeypatch.setattr(sparse_attention, kernel, None)  # put back at the end of the test
    exec(source.replace(right, wrong), vars(sparse_attention))


def results(interpret) -> list[jax.Array]:
    *qkv, among_BTS = made(1, 1, 1, 384, 8, 8)
    tiles = sparse_attention.Tiles(128, 128, 1, 128, 1, interpret=interpret)
    (out, lse), saved = sparse_attention._forward(*qkv, pack(among_BTS), tiles)
    return [out, lse, *sparse_attention._backward(tiles, saved, (jnp.ones_like(out), jnp.ones_like(lse)))[:3]]


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        ("_forward_kernel", "mixed_ref[...] = jnp.zeros(mixed_ref.shape, F32)", "pass"),
        ("_forward_kernel", "largest_ref[...] = jnp.full(largest_ref.shape, NO_KEY, F32)", "pass"),
        ("_backward_kernel", "dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, F32)", "pass"),
    ],
    ids=["out not zeroed", "largest not reset", "dk not zeroed"],
)
def test_memory_used_before_it_is_written_is_seen(monkeypatch, kernel, right, wrong):
    planted(monkeypatch, kernel, right, wrong)
    assert any(np.any(np.isnan(x)) for x in results(STRICT))


@pytest.mark.parametrize("right", ["fetch(i, turn).wait()", "put(i, turn_ref[0] - 1).wait()"], ids=["added to before it arrived", "left behind"])
def test_a_copy_that_nobody_waits_for_is_seen(monkeypatch, capfd, right):
    planted(monkeypatch, "_backward_kernel", right, "pass")
    results(EAGER)
    assert "RACE" in capfd.readouterr().out


@pytest.mark.parametrize(("at", "kernel", "place"), [(0, "_forward_kernel", "b, i, j"), (1, "_backward_kernel", "b, j, i")], ids=["forward", "backward"])
def test_a_tile_computed_in_vain_is_seen(monkeypatch, at, kernel, place):
    planted(monkeypatch, kernel, f"held_ref[{place}] != 0", f"held_ref[{place}] >= 0")
    *qkv, bits_BTW = with_holes()
    assert len(computed_tiles(monkeypatch, *qkv, bits_BTW)[at]) > np.sum(held_tiles(bits_BTW, 128, 128))
