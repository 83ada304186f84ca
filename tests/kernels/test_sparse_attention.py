"""Flash attention over selected keys equals autodiff through a dense softmax.

The kernels run in Pallas' TPU interpreter, which fills memory with NaN and watches for races; the
reference in chunks is tested alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import sparse_attention
from kernels.bitmask import nonempty_tiles, pack
from kernels.sparse_attention import Tiles, attend_reference, attend_tpu
from tests.interpreter import EAGER, STRICT

pytestmark = pytest.mark.usefixtures("no_races")


def made(B: int, N: int, K: int, T: int, H: int, V: int, dtype=jnp.float32):
    """Makes (q, k, v, the selection as bool): causal, a fifth of the keys, a query without any, and
    64 keys that no query selects.
    """
    rng = np.random.default_rng(0)
    q_BNTH, k_BKSH, v_BKSV = (
        jnp.asarray(rng.normal(size=(B, heads, T, width)), dtype)
        for heads, width in ((N, H), (K, H), (K, V))
    )
    selected_BTS = np.tril(rng.random((B, T, T)) < 0.2)
    selected_BTS[:, 5] = False
    selected_BTS[..., 64:128] = False
    return q_BNTH, k_BKSH, v_BKSV, jnp.asarray(selected_BTS)


def dense(q_BNTH, k_BKSH, v_BKSV, selected_BTS):
    """Computes (out, lse) by the definition."""
    k_BNSH, v_BNSV = (
        jnp.repeat(x, q_BNTH.shape[1] // x.shape[1], axis=1) for x in (k_BKSH, v_BKSV)
    )
    selected_B1TS = selected_BTS[:, None]
    logits_BNTS = jnp.where(
        selected_B1TS, jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, precision="highest"), -1e30
    )
    p_BNTS = jnp.where(selected_B1TS, jax.nn.softmax(logits_BNTS, axis=-1), 0)
    lse_BNT = jnp.where(
        jnp.any(selected_B1TS, axis=-1), jax.nn.logsumexp(logits_BNTS, axis=-1), 0.0
    )
    return jnp.einsum("BNTS,BNSV->BNTV", p_BNTS, v_BNSV, precision="highest"), lse_BNT


def graded(attend, q_BNTH, k_BNSH, v_BNSV):
    """Computes values, and gradients of a sum in which every element of both counts differently."""
    rng = np.random.default_rng(1)

    def total(q_BNTH, k_BNSH, v_BNSV):
        out, lse = attend(q_BNTH, k_BNSH, v_BNSV)
        return jnp.sum(out * rng.normal(size=out.shape)) + jnp.sum(
            lse * rng.normal(size=lse.shape)
        ), (out, lse)

    with jax.default_matmul_precision("highest"):
        (_, values), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(
            q_BNTH, k_BNSH, v_BNSV
        )
    return *values, *gradients


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1, 2, 2, 200, 24, 16), Tiles(128, 256, 2, 128, 2)),  # sizes that divide nothing
        ((2, 1, 1, 130, 8, 8), Tiles(128, 128, 1, 128, 1)),  # one head
        # values wider than keys, heads that two do not divide
        ((1, 3, 3, 140, 16, 24), Tiles(256, 128, 2, 256, 2)),
        # six tiles of queries: each slot for dq is used twice; values wider than a register
        ((1, 1, 1, 700, 8, 136), Tiles(128, 128, 1, 256, 1)),
        # heads of keys that serve two each: two in a program, and one
        ((1, 4, 2, 140, 8, 16), Tiles(128, 128, 4, 128, 2)),
        # a head of keys that serves all, in two programs
        ((1, 4, 1, 260, 8, 16), Tiles(128, 256, 2, 128, 2)),
    ],
    ids=["odd", "one head", "wide values", "long", "grouped", "one head of keys"],
)
def test_the_kernels_are_the_definition(shape, tiles):
    *qkv, selected_BTS = made(*shape)
    expected = graded(lambda *qkv: dense(*qkv, selected_BTS=selected_BTS), *qkv)
    found = graded(
        lambda *qkv: attend_tpu(
            *qkv, bits_BTW=pack(selected_BTS), tiles=tiles._replace(interpret=STRICT)
        ),
        *qkv,
    )
    for one, other in zip(found, expected, strict=True):
        # Sums of up to 200 float32 products.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
    out_BNTV, lse_BNT, dq_BNTH, *_ = found
    assert not any(np.any(x[:, :, 5]) for x in (out_BNTV, lse_BNT, dq_BNTH)), "a query without keys"


def test_rows_whose_tables_do_not_fit_are_computed_in_groups(monkeypatch):
    *qkv, selected_BTS = made(4, 2, 2, 300, 8, 8)
    tiles = Tiles(128, 128, keys_backward=128, interpret=True)
    all_at_once = graded(
        lambda *qkv: attend_tpu(*qkv, bits_BTW=pack(selected_BTS), tiles=tiles), *qkv
    )
    # Two rows of 3 x 3 tiles, each 3 in 128 words.
    monkeypatch.setattr("kernels.tiles.TABLE_BYTES", 8 * 3 * 128 * 2)
    row_counts, real_call = [], sparse_attention._call

    def counting_call(kernel, name, operands, *rest, **options):
        row_counts.append(operands[0].array.shape[0])
        return real_call(kernel, name, operands, *rest, **options)

    monkeypatch.setattr(sparse_attention, "_call", counting_call)
    two_by_two = graded(
        lambda *qkv: attend_tpu(*qkv, bits_BTW=pack(selected_BTS), tiles=tiles), *qkv
    )
    assert set(row_counts) == {2}
    for one, other in zip(two_by_two, all_at_once, strict=True):
        np.testing.assert_array_equal(one, other)


def test_copies_may_be_done_at_once_or_late():
    """dq travels between chip and HBM during the arithmetic: whenever its copies are done, the
    results have the same bits.
    """
    *qkv, selected_BTS = made(1, 1, 1, 640, 8, 8)
    late, at_once = (
        graded(
            lambda *qkv, mode=mode: attend_tpu(
                *qkv,
                bits_BTW=pack(selected_BTS),
                tiles=Tiles(128, 256, 1, 128, 1, interpret=mode),
            ),
            *qkv,
        )
        for mode in (STRICT, EAGER)
    )
    for one, other in zip(late, at_once, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("queries", [64, 77, 256])
def test_the_reference_is_the_definition(queries):
    *qkv, selected_BTS = made(2, 4, 2, 200, 24, 16)
    expected = graded(lambda *qkv: dense(*qkv, selected_BTS=selected_BTS), *qkv)
    found = graded(
        lambda *qkv: attend_reference(*qkv, bits_BTW=pack(selected_BTS), queries=queries), *qkv
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_in_bfloat16_values_and_gradients_are_the_definition_of_the_same_numbers():
    """A head of keys serves four, in two programs.

    A rounding is 2^-9, of the largest of a result at most: out has two, of p and its own; a
    gradient four, of the cotangent, of out in delta (for dv, of p), of dlogits and its own. lse is
    rounded nowhere.
    """
    *qkv, selected_BTS = made(1, 4, 1, 260, 16, 24, jnp.bfloat16)
    found = graded(
        lambda *qkv: attend_tpu(
            *qkv,
            bits_BTW=pack(selected_BTS),
            tiles=Tiles(128, 256, 2, 128, 2, interpret=STRICT),
        ),
        *qkv,
    )
    expected = graded(
        lambda *qkv: dense(*qkv, selected_BTS=selected_BTS), *(x.astype(jnp.float32) for x in qkv)
    )
    for bound, one, other in zip((2**-8, 1e-5, 2**-7, 2**-7, 2**-7), found, expected, strict=True):
        np.testing.assert_allclose(
            one.astype(jnp.float32), other, rtol=0, atol=bound * np.max(np.abs(other))
        )


def computed_tiles(monkeypatch, q_BNTH, k_BKSH, v_BKSV, bits_BTW) -> tuple[list[int], list[int]]:
    """Lists which tiles of 128 keys the kernels compute, forward and backward: a tile is noted as
    its bits are unpacked.
    """
    tiles = Tiles(128, 128, 1, 128, 1, interpret=True)
    unpack, computed = sparse_attention.tile_bias, []

    def noting_tile_bias(bits_QL, tile, keys):
        jax.debug.callback(lambda tile: computed.append(int(tile)), tile)
        return unpack(bits_QL, tile, keys)

    monkeypatch.setattr(sparse_attention, "tile_bias", noting_tile_bias)
    # JAX must not have seen these functions: those that it knows it does not trace again.
    for name in ("_forward_kernel", "_backward_kernel"):
        kernel = functools.partial(getattr(sparse_attention, name))
        monkeypatch.setattr(sparse_attention, name, kernel)
    (out, lse), saved = sparse_attention._forward(q_BNTH, k_BKSH, v_BKSV, bits_BTW, tiles)
    jax.effects_barrier()
    forward = sorted(computed)
    computed.clear()
    sparse_attention._backward(tiles, saved, (jnp.ones_like(out), jnp.zeros_like(lse)))
    jax.effects_barrier()
    return forward, sorted(computed)


def with_holes():
    """Makes q, k, v and the bitmask: five tiles of 128 queries and keys. One tile of keys is
    selected by no query, and another not by its own queries.
    """
    *qkv, selected_BTS = made(1, 1, 1, 640, 8, 8)
    return *qkv, pack(selected_BTS.at[..., 128:256].set(False).at[:, 256:384, 256:384].set(False))


def test_only_tiles_with_a_selected_key_are_computed(monkeypatch):
    *qkv, bits_BTW = with_holes()
    nonempty = nonempty_tiles(bits_BTW, 128, 128)[0, :, :5]
    np.testing.assert_array_equal(
        nonempty,
        [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]],
    )
    for computed in computed_tiles(monkeypatch, *qkv, bits_BTW=bits_BTW):
        np.testing.assert_array_equal(computed, np.sort(np.nonzero(nonempty)[1]))


def test_tiles_without_a_selected_key_are_in_no_sum():
    """Keys 128 to 255 are selected by no query and are NaN: in a tile that is computed, the mask
    would not keep a NaN out of the sums.

    Whether such a tile is fetched does not show here: what is fetched in its place is
    `next_nonempty`, in test_selection.py.
    """
    q_BNTH, k_BKSH, v_BKSV, selected_BTS = made(1, 1, 1, 384, 8, 8)
    selected_BTS = selected_BTS.at[..., 128:256].set(False)
    k_BKSH, v_BKSV = k_BKSH.at[:, :, 128:256].set(jnp.nan), v_BKSV.at[:, :, 128:256].set(jnp.nan)
    tiles = Tiles(128, 128, 1, 128, 1, interpret=True)
    out, lse, dq, dk, dv = graded(
        lambda *qkv: attend_tpu(*qkv, bits_BTW=pack(selected_BTS), tiles=tiles),
        q_BNTH,
        k_BKSH,
        v_BKSV,
    )
    for x in (out, lse, dq, dk, dv):
        assert np.all(np.isfinite(x))
    assert not np.any(dk[:, :, 128:256]) and not np.any(dv[:, :, 128:256])
    # A query that does select such a key has it computed.
    one = jnp.zeros((1, 384, 384), bool).at[0, 300, 130].set(True)
    out, _ = attend_tpu(q_BNTH, k_BKSH, v_BKSV, pack(selected_BTS | one), tiles)
    assert np.all(np.isnan(out[0, 0, 300]))
