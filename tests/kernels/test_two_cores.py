"""Two cores of a chip, each with its share of a kernel's work, do not get in each other's way.

A TPU whose two cores are one device shares out the axes that a kernel calls parallel. So does the
interpreter: what both do to the same place is a race. Values are those of one core, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import decode_selection, selection, sparse_attention, sparse_decode
from kernels.bitmask import pack
from tests.interpreter import STRICT, TWO_CORES, complaints
from tests.kernels import (
    test_decode_selection,
    test_selection,
    test_sparse_attention,
    test_sparse_decode,
)


def attention(interpret, heads: int = 2):
    """Lies over the cores by rows, heads and tiles of queries; its gradients by rows and heads."""
    q, k, v, selected_BTS = test_sparse_attention.made(1, heads, heads, 140, 8, 8)
    tiles = sparse_attention.Tiles(128, 128, 1, 128, 1, interpret=interpret)
    (out, lse), saved = sparse_attention._forward(q, k, v, pack(selected_BTS), tiles)
    return (
        out,
        lse,
        *sparse_attention._backward(tiles, saved, (jnp.ones_like(out), jnp.ones_like(lse)))[:3],
    )


def select(interpret):
    """Lies over the cores by rows and blocks of queries."""
    return test_selection.select(
        selection.select_tpu,
        test_selection.inputs(1, 20, 1, 8, segments=2),
        3,
        interpret=interpret,
        queries=8,
        keys=128,
    )


def decode(interpret):
    """Lies over the cores by rows and splits of a row."""
    q, latent, index, count = test_sparse_decode.inputs((0, 23, 40), 2, 24)
    return sparse_decode.decode_tpu(
        q,
        sparse_decode.to_tiles(latent),
        16,
        index,
        count,
        keys=test_sparse_decode.CHUNK,
        num_splits=2,
        interpret=interpret,
    )


def select_for_decoding(interpret):
    """Lies over the cores by rows."""
    return decode_selection.list_selected_tpu(
        *test_decode_selection.inputs(1_500, False), 100, 0.8, keys=1_024, interpret=interpret
    )


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "kernel", [attention, select, decode, select_for_decoding], ids=lambda kernel: kernel.__name__
)
def test_cores_do_not_meet(kernel):
    for one, other in zip(
        jax.tree.leaves(kernel(TWO_CORES)), jax.tree.leaves(kernel(STRICT)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_cores_that_meet_are_seen(monkeypatch, capfd, caplog):
    """All axes are called parallel: two tiles of keys of one head add to the same dq."""

    def all_parallel(real, dimension_semantics, **options):
        return real(dimension_semantics=("parallel",) * len(dimension_semantics), **options)

    monkeypatch.setattr(
        pltpu, "CompilerParams", functools.partial(all_parallel, pltpu.CompilerParams)
    )
    assert "RACE DETECTED" in complaints(lambda: attention(TWO_CORES, heads=1), capfd, caplog)
