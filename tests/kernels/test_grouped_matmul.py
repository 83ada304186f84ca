"""A matmul for each group of rows equals its definition, in values and gradients.

megablox runs in Pallas' interpreter, which fills memory with NaN and watches for races.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import Tiles, megablox, tile_rows, tile_width, tokamax
from tests import tiny
from tests.interpreter import STRICT

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = functools.partial(megablox, tiles=Tiles(128, STRICT))
COUNTS = {
    # empty groups first and between, groups that begin and end inside a tile, rows of no group
    "uneven": (0, 7, 130, 51, 0, 1),
    "one": (0, 0, 260, 0, 0, 0),  # all rows are one group's
    "whole tiles": (128, 0, 0, 128, 0, 0),
    "none": (0, 0, 0, 0, 0, 0),
}


def by_definition(x_SD, w_EDF, counts_E):
    first_E = jnp.cumsum(counts_E) - counts_E
    row_S1 = jnp.arange(x_SD.shape[0])[:, None]
    parts = [
        jnp.where((row_S1 >= first) & (row_S1 < first + count), x_SD, 0) @ w_DF
        for first, count, w_DF in zip(first_E, counts_E, w_EDF, strict=True)
    ]
    return functools.reduce(jnp.add, parts)


@functools.partial(jax.jit, static_argnums=0)
def graded(matmul, x_SD, w_EDF, counts_E, dy_SF):
    out_SF, backward = jax.vjp(lambda x_SD, w_EDF: matmul(x_SD, w_EDF, counts_E), x_SD, w_EDF)
    return out_SF, *backward(dy_SF)


def made(S: int, D: int, F: int, counts: tuple[int, ...], dtype):
    """Makes the operands, and the same with NaN in the rows that belong to no group."""
    rng = np.random.default_rng(0)
    x_SD, w_EDF, dy_SF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((S, D), (len(counts), D, F), (S, F))
    )
    clean = (
        jnp.asarray(x_SD, dtype),
        jnp.asarray(w_EDF, dtype),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(dy_SF, dtype),
    )
    ungrouped_S1 = np.arange(S)[:, None] >= sum(counts)
    dirty = (
        jnp.where(ungrouped_S1, jnp.nan, clean[0]),
        *clean[1:3],
        jnp.where(ungrouped_S1, jnp.nan, clean[3]),
    )
    return clean, dirty


def grouped_rows(graded, counts: tuple[int, ...]):
    """Leaves out the rows that belong to no group."""
    out_SF, dx_SD, dw_EDF = graded
    return out_SF[: sum(counts)], dx_SD[: sum(counts)], dw_EDF


@pytest.mark.parametrize("load", COUNTS)
def test_megablox_is_the_definition(load):
    """The widths are cut, and no tile divides them: 520 into two of 384, and 130 as it is."""
    clean, dirty = made(260, 520, 130, COUNTS[load], jnp.float32)
    found = grouped_rows(graded(WATCHED, *dirty), COUNTS[load])
    expected = grouped_rows(graded(by_definition, *clean), COUNTS[load])
    # Up to 520 float32 products in another order.
    tiny.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert not np.any(found[2][np.asarray(COUNTS[load]) == 0]), "groups without rows"


def test_megablox_sums_bfloat16_in_float32():
    clean, dirty = made(260, 72, 40, COUNTS["uneven"], jnp.bfloat16)
    found = grouped_rows(graded(WATCHED, *dirty), COUNTS["uneven"])
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    wide = (leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf for leaf in clean)
    exact = grouped_rows(graded(by_definition, *wide), COUNTS["uneven"])
    # A sum is rounded once, at the end: by half of the last of 8 bits. Sums in bfloat16 would be
    # off by many times that.
    tiny.assert_close(
        tuple(leaf.astype(jnp.float32) for leaf in found), exact, rtol=2**-8, atol=1e-4
    )


def test_tokamax_is_the_definition():
    """On CPU it has only XLA's implementation: what is tested is how it is called."""
    pytest.importorskip(
        "tokamax", reason="optional: pip install tokamax, with Python 3.12 or newer"
    )
    clean, _ = made(260, 72, 40, COUNTS["uneven"], jnp.float32)
    found, expected = (
        grouped_rows(graded(matmul, *clean), COUNTS["uneven"])
        for matmul in (functools.partial(tokamax, kernels="xla"), by_definition)
    )
    tiny.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_tiles_fit_and_waste_little():
    for dtype, most in ((jnp.bfloat16, 1_024), (jnp.float32, 512)):
        for size in (16, 130, 512, 1_408, 1_536, 2_048, 5_120, 7_168):
            width = tile_width(size, dtype)
            assert width <= most and (
                width == size or (width % 128 == 0 and -(-size // width) * width <= 1.1 * size)
            )
    assert [tile_rows(mean) for mean in (1, 300, 1_024, 99_999)] == [128, 128, 512, 512]
    # A group has half a tile of padding on average.
    assert all(tile_rows(mean) / 2 <= mean / 4 for mean in range(256, 5_000))
