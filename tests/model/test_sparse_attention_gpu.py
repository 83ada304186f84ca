"""Flash attention over chosen keys on Hopper, in Pallas' GPU interpreter, which fills memory with NaN and watches for races between the warpgroups: values and
gradients against autodiff through a dense softmax. Products are plain ones there (docs/gpu.md): that they compile is tests/compile/test_gpu_kernels.py."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from JAX 0.11 on, in the same place

from model.kernels.keyset import pack
from model.kernels.sparse_attention_gpu import WORD, Tiles, attend_gpu, held_first, words_along
from tests.model.test_sparse_attention import dense, graded, made

STRICT = InterpretGPUParams(uninitialized_memory="nan", detect_races=True)


def test_bits_are_rearranged_along_either_axis():
    T, S = 200, 300
    among_BTS = np.random.default_rng(0).random((2, T, S)) < 0.3
    bits_BTW = pack(jnp.asarray(among_BTS))
    t, s = np.meshgrid(np.arange(T), np.arange(S), indexing="ij")
    along_keys = np.asarray(words_along(2, bits_BTW, S))
    along_queries = np.asarray(words_along(1, bits_BTW, S))
    assert along_keys.shape == (2, 384 // WORD, 256) and along_queries.shape == (2, 256 // WORD, 384)
    np.testing.assert_array_equal(along_keys[:, s // WORD, t] >> (s % WORD) & 1, among_BTS)
    np.testing.assert_array_equal(along_queries[:, t // WORD, s] >> (t % WORD) & 1, among_BTS)
    ones = along_keys.view(np.uint32).astype(object)
    assert sum(int(word).bit_count() for word in ones.ravel()) == among_BTS.sum(), "nothing but these in what was padded"


def test_held_tiles_come_first_and_in_order():
    among = np.zeros((1, 256, 512), bool)
    among[0, 130, [3, 200, 450]] = True
    order, count = held_first(words_along(2, pack(jnp.asarray(among)), 512), 64)
    np.testing.assert_array_equal(count, [[0, 3]])
    np.testing.assert_array_equal(order[0, 1, :3], [0, 3, 7])


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1, 2, 200, 24, 16), Tiles()),  # sizes that divide nothing
        ((1, 1, 300, 24, 72), Tiles(forward=64, backward=64)),  # one head, more tiles than stages
    ],
    ids=["odd", "ring"],
)
def test_the_kernels_are_the_definition(shape, tiles):
    *qkv, among_BTS = made(*shape)
    expected = graded(lambda *qkv: dense(*qkv, among_BTS), *qkv)
    found = graded(lambda *qkv: attend_gpu(*qkv, pack(among_BTS), tiles._replace(interpret=STRICT)), *qkv)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)  # sums of up to 300 float32 products
    out_BNTV, lse_BNT, dq_BNTH, *_ = found
    assert not np.any(out_BNTV[:, :, 5]) and not np.any(lse_BNT[:, :, 5]) and not np.any(dq_BNTH[:, :, 5]), "a query without keys"
