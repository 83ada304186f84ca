"""Flash attention over chosen keys, in Pallas' TPU interpreter, which fills memory with NaN and watches for races: values and gradients against autodiff
through a dense softmax. So is the reference in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from model.kernels.keyset import held_tiles, pack
from model.kernels.sparse_attention import Tiles, attend_reference, attend_tpu

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


def made(B: int, N: int, T: int, H: int, V: int, dtype=jnp.float32):
    """(q, k, v, the set as bool): causal, a fifth of the keys, a query without any, and 64 keys that nobody wants."""
    rng = np.random.default_rng(0)
    q_BNTH, k_BNSH, v_BNSV = (jnp.asarray(rng.normal(size=(B, N, T, width)), dtype) for width in (H, H, V))
    among_BTS = np.tril(rng.random((B, T, T)) < 0.2)
    among_BTS[:, 5] = False
    among_BTS[..., 64:128] = False
    return q_BNTH, k_BNSH, v_BNSV, jnp.asarray(among_BTS)


def dense(q_BNTH, k_BNSH, v_BNSV, among_BTS):
    """(out, lse) of the definition."""
    among_B1TS = among_BTS[:, None]
    logits_BNTS = jnp.where(among_B1TS, jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, precision="highest"), -1e30)
    p_BNTS = jnp.where(among_B1TS, jax.nn.softmax(logits_BNTS, axis=-1), 0)
    lse_BNT = jnp.where(jnp.any(among_B1TS, axis=-1), jax.nn.logsumexp(logits_BNTS, axis=-1), 0.0)
    return jnp.einsum("BNTS,BNSV->BNTV", p_BNTS, v_BNSV, precision="highest"), lse_BNT


def graded(attend, q_BNTH, k_BNSH, v_BNSV):
    """Values, and gradients of a sum in which every element of both counts differently."""
    rng = np.random.default_rng(1)

    def total(q_BNTH, k_BNSH, v_BNSV):
        out, lse = attend(q_BNTH, k_BNSH, v_BNSV)
        return jnp.sum(out * rng.normal(size=out.shape)) + jnp.sum(lse * rng.normal(size=lse.shape)), (out, lse)

    with jax.default_matmul_precision("highest"):
        (_, values), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q_BNTH, k_BNSH, v_BNSV)
    return *values, *gradients


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1, 2, 200, 24, 16), Tiles(128, 256, heads=2)),  # sizes that divide nothing
        ((2, 1, 130, 8, 8), Tiles(128, 128, heads=1)),  # one head
        ((1, 4, 140, 16, 24), Tiles(256, 128, heads=2)),  # values wider than keys, heads in two programs
    ],
    ids=["odd", "one head", "wide values"],
)
def test_the_kernels_are_the_definition(shape, tiles):
    *qkv, among_BTS = made(*shape)
    expected = graded(lambda *qkv: dense(*qkv, among_BTS), *qkv)
    found = graded(lambda *qkv: attend_tpu(*qkv, pack(among_BTS), tiles._replace(interpret=STRICT)), *qkv)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)  # sums of up to 200 float32 products
    out_BNTV, lse_BNT, dq_BNTH, *_ = found
    assert not np.any(out_BNTV[:, :, 5]) and not np.any(lse_BNT[:, :, 5]) and not np.any(dq_BNTH[:, :, 5]), "a query without keys"


@pytest.mark.parametrize("queries", [64, 77, 256])
def test_the_reference_is_the_definition(queries):
    *qkv, among_BTS = made(2, 2, 200, 24, 16)
    expected = graded(lambda *qkv: dense(*qkv, among_BTS), *qkv)
    found = graded(lambda *qkv: attend_reference(*qkv, pack(among_BTS), queries=queries), *qkv)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_bfloat16_rounds_as_the_reference_does():
    *qkv, among_BTS = made(1, 2, 130, 16, 16, jnp.bfloat16)
    found = attend_tpu(*qkv, pack(among_BTS), Tiles(128, 128, interpret=STRICT))
    for one, other in zip(found, dense(*(x.astype(jnp.float32) for x in qkv), among_BTS), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02)  # 8 bits of values up to 3


def test_tiles_without_a_chosen_key_are_not_computed():
    """Keys 128 to 255 are chosen by nobody and are NaN: in a tile that is computed, the mask would not keep a NaN out of the sums."""
    q_BNTH, k_BNSH, v_BNSV, among_BTS = made(1, 1, 384, 8, 8)
    among_BTS = among_BTS.at[..., 128:256].set(False)
    k_BNSH, v_BNSV = k_BNSH.at[:, :, 128:256].set(jnp.nan), v_BNSV.at[:, :, 128:256].set(jnp.nan)
    bits_BTW, tiles = pack(among_BTS), Tiles(128, 128, interpret=True)
    np.testing.assert_array_equal(held_tiles(bits_BTW, 128, 128)[0, :, :3], [[1, 0, 0], [1, 0, 0], [1, 0, 1]])
    out, lse, dq, dk, dv = graded(lambda *qkv: attend_tpu(*qkv, bits_BTW, tiles), q_BNTH, k_BNSH, v_BNSV)
    for x in (out, lse, dq, dk, dv):
        assert np.all(np.isfinite(x))
    assert not np.any(dk[:, :, 128:256]) and not np.any(dv[:, :, 128:256])
    one = jnp.zeros((1, 384, 384), bool).at[0, 300, 130].set(True)  # and one that wants such a key has it computed
    assert np.all(np.isnan(attend_tpu(q_BNTH, k_BNSH, v_BNSV, pack(among_BTS | one), tiles)[0][0, 0, 300]))
