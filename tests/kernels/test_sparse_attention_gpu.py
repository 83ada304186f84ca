"""Flash attention over selected keys on Hopper equals autodiff through a dense softmax.

The kernels run in Pallas' GPU interpreter, which fills memory with NaN and watches for races
between the warpgroups. Products are plain ones there (docs/gpu.md): that wgmma compiles is tested
in tests/compile/test_gpu_kernels.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

# It is public from JAX 0.11 on, in the same place.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels.bitmask import along_keys, along_queries, pack
from kernels.hopper_pipeline import nonempty_first
from kernels.sparse_attention import attend_reference
from kernels.sparse_attention_gpu import Tiles, attend_gpu
from tests.kernels import test_sparse_attention as tpu
from tests.kernels.test_sparse_attention import dense, graded

pytestmark = pytest.mark.usefixtures("no_races")

STRICT = InterpretGPUParams(uninitialized_memory="nan", detect_races=True)
# The interpreter of JAX 0.10 compiles anew for each warpgroup.
interpreted = pytest.mark.slow if jax.__version_info__ < (0, 11) else lambda test: test
# The kernels' own code is not promised to be stable; nothing here keeps what is exported.
CUSTOM = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]


def made(B: int, N: int, T: int, H: int, V: int, dtype=jnp.float32):
    """Makes what the TPU's tests do, with a head of keys for each of queries."""
    return tpu.made(B, N, N, T, H, V, dtype)


def test_bits_are_rearranged_along_either_axis():
    T, S = 96, 4_300
    selected_BTS = np.random.default_rng(0).random((2, T, S)) < 0.3
    bits_BTW = pack(jnp.asarray(selected_BTS))
    t, s = np.meshgrid(np.arange(T), np.arange(S), indexing="ij")
    by_key, by_query = np.asarray(along_keys(bits_BTW)), np.asarray(along_queries(bits_BTW))
    assert by_key.shape == (2, 256, T) and by_query.shape == (2, T // 32, 8_192)
    np.testing.assert_array_equal(by_key[:, s // 32, t] >> (s % 32) & 1, selected_BTS)
    np.testing.assert_array_equal(by_query[:, t // 32, s] >> (t % 32) & 1, selected_BTS)
    for words in (by_key, by_query):
        assert np.bitwise_count(words.view(np.uint32)).sum() == selected_BTS.sum(), (
            "nothing but these in what was padded"
        )


def test_tiles_with_a_key_come_first_and_in_order():
    selected = np.zeros((1, 256, 512), bool)
    selected[0, 130, [3, 200, 450]] = True
    order, count = nonempty_first(along_keys(pack(jnp.asarray(selected))), 64)
    np.testing.assert_array_equal(count, [[0, 3]])
    np.testing.assert_array_equal(order[0, 1, :3], [0, 3, 7])


def causal_segments(lengths: list[int], share: float):
    """Makes a selection, bool [1, T, T], for sequences packed one behind the other: each query has
    a share of the keys of its own sequence up to itself.
    """
    segment_T = np.repeat(np.arange(len(lengths)), lengths)
    own_TS = segment_T[:, None] == segment_T[None]
    return jnp.asarray(np.tril(own_TS & (np.random.default_rng(2).random(own_TS.shape) < share)))[
        None
    ]


@interpreted
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1, 2, 140, 24, 16), Tiles()),  # sizes that divide nothing
        # more tiles than the ring has slots; values wider than keys
        ((1, 1, 300, 24, 72), Tiles(forward=64)),
    ],
    ids=["odd", "ring"],
)
def test_the_kernels_are_the_definition(shape, tiles):
    *qkv, selected_BTS = made(*shape)
    expected = graded(lambda *qkv: dense(*qkv, selected_BTS=selected_BTS), *qkv)
    found = graded(
        lambda *qkv: attend_gpu(
            *qkv, bits_BTW=pack(selected_BTS), tiles=tiles._replace(interpret=STRICT)
        ),
        *qkv,
    )
    for one, other in zip(found, expected, strict=True):
        # Sums of up to 300 float32 products.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
    out_BNTV, lse_BNT, dq_BNTH, *_ = found
    assert not any(np.any(x[:, :, 5]) for x in (out_BNTV, lse_BNT, dq_BNTH)), "a query without keys"


@interpreted
def test_packed_sequences_and_tiles_that_no_query_selects():
    """Keys 128 to 255 are selected by no query and are NaN: in a tile that is fetched, the mask
    would not keep a NaN out of the sums.
    """
    selected_BTS = causal_segments([128, 140, 116], 0.3).at[..., 128:256].set(False)
    q, k, v, _ = made(1, 1, 384, 24, 16)
    expected = graded(lambda *qkv: dense(*qkv, selected_BTS=selected_BTS), q, k, v)
    k, v = k.at[:, :, 128:256].set(jnp.nan), v.at[:, :, 128:256].set(jnp.nan)
    found = graded(
        lambda *qkv: attend_gpu(*qkv, bits_BTW=pack(selected_BTS), tiles=Tiles(interpret=STRICT)),
        q,
        k,
        v,
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@interpreted
def test_bfloat16_rounds_as_the_reference_does():
    *qkv, selected_BTS = made(1, 1, 130, 16, 16, jnp.bfloat16)
    found = graded(
        lambda *qkv: attend_gpu(*qkv, bits_BTW=pack(selected_BTS), tiles=Tiles(interpret=STRICT)),
        *qkv,
    )
    for one, other in zip(
        found,
        graded(lambda *qkv: attend_reference(*qkv, bits_BTW=pack(selected_BTS)), *qkv),
        strict=True,
    ):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        # 8 bits, of the probabilities too.
        np.testing.assert_allclose(one, other, atol=0.02 * np.max(np.abs(other)))


def test_it_lowers_for_a_gpu_without_its_compiler():
    """It lowers as far as Mosaic's own code: layouts, shared memory, barriers. What the GPU's
    compiler makes of that is tested in tests/compile/test_gpu_kernels.py.
    """

    def gradients(q, k, v, bits):
        def total(q, k, v):
            out_BNTV, _ = attend_gpu(q, k, v, bits)
            return jnp.sum(out_BNTV.astype(jnp.float32))

        return jax.grad(total, (0, 1, 2))(q, k, v)

    heads = [jax.ShapeDtypeStruct((1, 2, 512, width), jnp.bfloat16) for width in (192, 192, 128)]
    exported = export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=CUSTOM)(
        *heads, jax.ShapeDtypeStruct((1, 512, 128), jnp.int32)
    )
    assert exported.mlir_module().count("custom_call @mosaic_gpu_v2") == 3, "forward, dq, dk and dv"


def test_float32_is_refused_on_a_gpu():
    *qkv, selected_BTS = made(1, 1, 64, 16, 16)
    with pytest.raises(TypeError, match="float32"):
        attend_gpu(*qkv, bits_BTW=pack(selected_BTS))
