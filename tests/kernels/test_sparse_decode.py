"""The decode kernel in Pallas' interpreters equals the reference.

The watchful interpreter fills memory with NaN and reports races; the plain one reads latents from
their tiles as the compiled kernel does.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.sparse_decode import decode_reference, decode_tpu, from_tiles, to_tiles
from tests.interpreter import STRICT

pytestmark = pytest.mark.usefixtures("no_races")
CHUNK = 16
F32, BF16 = jnp.float32, jnp.bfloat16


def inputs(counts: tuple[int, ...], heads: int, rank: int, k: int = 40, S: int = 90, dtype=F32):
    """Makes (q, latents, lists of k different tokens in no order, how many of each list count)."""
    rng = np.random.default_rng(0)
    B = len(counts)
    q_BNR, latent_BSR = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, heads, rank), (B, S, rank))
    )
    index_Bk = np.stack([rng.permutation(S)[:k] for _ in range(B)])
    return (
        q_BNR * jnp.asarray(rank**-0.5, dtype),
        latent_BSR,
        jnp.asarray(index_Bk, jnp.int32),
        jnp.asarray(counts, jnp.int32),
    )


def by_hand(q_BNR, latent_BSR, value_rank, index_Bk, count_B) -> np.ndarray:
    """Attends in float64, row by row."""
    q_BNR, latent_BSR = np.asarray(q_BNR, np.float64), np.asarray(latent_BSR, np.float64)
    out_BNV = np.zeros((*q_BNR.shape[:2], value_rank))
    for b, count in enumerate(count_B):
        if count:
            latent_kR = latent_BSR[b, np.asarray(index_Bk[b, :count])]
            logits_Nk = q_BNR[b] @ latent_kR.T
            p_Nk = np.exp(logits_Nk - logits_Nk.max(axis=1, keepdims=True))
            out_BNV[b] = p_Nk / p_Nk.sum(axis=1, keepdims=True) @ latent_kR[:, :value_rank]
    return out_BNV


CASES = {  # counts, heads, rank, value rank, more
    "no chunk, one key, an odd number, all": ((0, 1, 23, 40), 3, 40, 32, {}),
    "whole chunks": ((16, 32), 1, 24, 24, {"k": 32}),
    "one row, many heads, several tiles": ((37,), 20, 300, 260, {}),
    "k beyond the slots' chunks": ((7,), 2, 24, 16, {"k": 7, "S": 200}),
}


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_reference(case, num_splits):
    """In float32: the tolerance is for sums in another order, whose error grows as the root of
    their number. Of 300 terms two kinds of CPU differ by 2.3e-6.
    """
    counts, heads, rank, value_rank, more = CASES[case]
    q, latent, index, count = inputs(counts, heads, rank, **more)
    expected = decode_reference(q, latent, value_rank, index, count)
    np.testing.assert_allclose(expected, by_hand(q, latent, value_rank, index, count), atol=2e-6)
    found = decode_tpu(
        q,
        to_tiles(latent),
        value_rank,
        index,
        count,
        keys=CHUNK,
        num_splits=num_splits,
        interpret=STRICT,
    )
    rounding = 2e-6 * max(rank / 24, 1) ** 0.5
    np.testing.assert_allclose(found, expected, atol=rounding)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("interpret", [STRICT, True], ids=["whole", "as compiled"])
def test_latents_come_out_of_their_tiles(interpret, dtype):
    """In bfloat16 the products are of rounded probabilities, of size 1, so an output is off by a
    last place or two (2 ** -8 each).
    """
    q, latent, index, count = inputs((0, 23), 3, 300, dtype=dtype)
    found = decode_tpu(q, to_tiles(latent), 280, index, count, keys=CHUNK, interpret=interpret)
    assert found.dtype == dtype and not np.any(found[0])
    np.testing.assert_allclose(
        found.astype(F32),
        by_hand(q, latent, 280, index, count),
        atol=2e-6 if dtype == F32 else 2e-2,
    )


def test_tokens_behind_the_count_change_nothing():
    q, latent, index, count = inputs((23,), 2, 24)
    other = index.at[:, 23:].set((index[:, 23:] + 1) % latent.shape[1])
    decode = functools.partial(
        decode_tpu, q, to_tiles(latent), 16, count_B=count, keys=CHUNK, interpret=True
    )
    np.testing.assert_array_equal(decode(index_Bk=index), decode(index_Bk=other))
    assert np.any(decode(index_Bk=index) != decode(index_Bk=other, count_B=count + 1))


def test_tiles_hold_the_latents():
    latent_BSR = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 576)), BF16)
    tiles = to_tiles(latent_BSR)
    assert tiles.shape == (2, 5, 3, 2, 128)
    np.testing.assert_array_equal(from_tiles(tiles, 576), latent_BSR)
    assert not np.any(from_tiles(tiles, 768)[..., 576:])
