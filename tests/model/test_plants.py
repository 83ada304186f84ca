"""Faults put into the kernels on purpose: what tests/model/test_sparse_attention.py looks at must show each of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import sparse_attention
from model.kernels.keyset import held_tiles, pack
from tests.model.test_sparse_attention import STRICT, computed_tiles, made

TILES = sparse_attention.Tiles(128, 128, 1, 128, 1, interpret=STRICT)


def planted(monkeypatch, kernel: str, right: str, wrong: str) -> None:
    source = inspect.getsource(getattr(sparse_attention, kernel))
    assert source.count(right) == 1
    namespace = dict(vars(sparse_attention))
    exec(source.replace(right, wrong), namespace)
    monkeypatch.setattr(sparse_attention, kernel, namespace[kernel])


def gradients() -> list[jax.Array]:
    *qkv, among_BTS = made(1, 1, 1, 700, 8, 8)
    (out, lse), saved = sparse_attention._forward(*qkv, pack(among_BTS), TILES)
    return [out, lse, *sparse_attention._backward(TILES, saved, (jnp.ones_like(out), jnp.ones_like(lse)))[:3]]


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
    assert any(np.any(np.isnan(x)) for x in gradients())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("fetch(i, turn).wait()", "pass"), ("put(i, turn - 1).wait()", "pass"), ("DQ_TILES = 3", "")],
    ids=["added to before it arrived", "fetched into before it left", "too few places"],
)
def test_a_race_is_seen(monkeypatch, capfd, right, wrong):
    if wrong:
        planted(monkeypatch, "_backward_kernel", right, wrong)
    else:
        monkeypatch.setattr(sparse_attention, "DQ_TILES", 2)
    gradients()
    assert "RACE" in capfd.readouterr().out


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_a_tile_computed_in_vain_is_seen(monkeypatch, kernel):
    place = "b, i, j" if kernel == "_forward_kernel" else "b, j, i"
    planted(monkeypatch, kernel, f"held_ref[{place}] != 0", f"held_ref[{place}] >= 0")
    q, k, v, among_BTS = made(1, 1, 1, 384, 8, 8)
    bits = pack(among_BTS)
    forward, backward = computed_tiles(q, k, v, bits, 128)
    computed = forward if kernel == "_forward_kernel" else backward
    assert np.sum(computed) > np.sum(held_tiles(bits, 128, 128))
