"""Flash attention over chosen keys on Hopper, in Pallas' GPU interpreter, which fills memory with
NaN and watches for races between the warpgroups: values and gradients against autodiff through a
dense softmax. Products are plain ones there (docs/gpu.md): that they compile is
tests/compile/test_gpu_kernels.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,  # public from JAX 0.11 on, in the same place
)

import bench.gpu
from errors import UserError
from kernels.bitmask import along_keys, along_queries, pack, unpack
from kernels.hopper_pipeline import nonempty_first
from kernels.sparse_attention import attend_reference
from kernels.sparse_attention_gpu import Tiles, attend_gpu
from tests.kernels import test_sparse_attention as tpu
from tests.kernels.test_sparse_attention import dense, graded

pytestmark = pytest.mark.usefixtures("no_races")

STRICT = InterpretGPUParams(uninitialized_memory="nan", detect_races=True)
interpreted = (
    pytest.mark.slow if jax.__version_info__ < (0, 11) else lambda test: test
)  # the interpreter of JAX 0.10 compiles anew for each warpgroup
CUSTOM = [
    export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
]  # not promised to be stable: it is not kept here


def made(B: int, N: int, T: int, H: int, V: int, dtype=jnp.float32):
    """As the TPU's tests have it, a head of keys for each of queries."""
    return tpu.made(B, N, N, T, H, V, dtype)


def test_bits_are_rearranged_along_either_axis():
    T, S = 96, 4_300
    among_BTS = np.random.default_rng(0).random((2, T, S)) < 0.3
    bits_BTW = pack(jnp.asarray(among_BTS))
    t, s = np.meshgrid(np.arange(T), np.arange(S), indexing="ij")
    by_key, by_query = np.asarray(along_keys(bits_BTW)), np.asarray(along_queries(bits_BTW))
    assert by_key.shape == (2, 256, T) and by_query.shape == (2, T // 32, 8_192)
    np.testing.assert_array_equal(by_key[:, s // 32, t] >> (s % 32) & 1, among_BTS)
    np.testing.assert_array_equal(by_query[:, t // 32, s] >> (t % 32) & 1, among_BTS)
    for words in (by_key, by_query):
        assert np.bitwise_count(words.view(np.uint32)).sum() == among_BTS.sum(), (
            "nothing but these in what was padded"
        )


def test_held_tiles_come_first_and_in_order():
    among = np.zeros((1, 256, 512), bool)
    among[0, 130, [3, 200, 450]] = True
    order, count = nonempty_first(along_keys(pack(jnp.asarray(among))), 64)
    np.testing.assert_array_equal(count, [[0, 3]])
    np.testing.assert_array_equal(order[0, 1, :3], [0, 3, 7])


def causal_segments(lengths: list[int], share: float):
    """The set as bool [1, T, T]: of sequences packed one behind the other, each query a share of
    its own up to itself.
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
        (
            (1, 1, 300, 24, 72),
            Tiles(forward=64),
        ),  # more tiles than the ring has places; values wider than keys
    ],
    ids=["odd", "ring"],
)
def test_the_kernels_are_the_definition(shape, tiles):
    *qkv, among_BTS = made(*shape)
    expected = graded(lambda *qkv: dense(*qkv, among_BTS), *qkv)
    found = graded(
        lambda *qkv: attend_gpu(*qkv, pack(among_BTS), tiles._replace(interpret=STRICT)), *qkv
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=1e-5, atol=2e-5
        )  # sums of up to 300 float32 products
    out_BNTV, lse_BNT, dq_BNTH, *_ = found
    assert (
        not np.any(out_BNTV[:, :, 5])
        and not np.any(lse_BNT[:, :, 5])
        and not np.any(dq_BNTH[:, :, 5])
    ), "a query without keys"


@interpreted
def test_packed_sequences_and_tiles_that_nobody_wants():
    """Keys 128 to 255 are chosen by nobody and are NaN: in a tile that is fetched, the mask would
    not keep a NaN out of the sums.
    """
    among_BTS = causal_segments([128, 140, 116], 0.3).at[..., 128:256].set(False)
    q, k, v, _ = made(1, 1, 384, 24, 16)
    expected = graded(lambda *qkv: dense(*qkv, among_BTS), q, k, v)
    k, v = k.at[:, :, 128:256].set(jnp.nan), v.at[:, :, 128:256].set(jnp.nan)
    found = graded(lambda *qkv: attend_gpu(*qkv, pack(among_BTS), Tiles(interpret=STRICT)), q, k, v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@interpreted
def test_bfloat16_rounds_as_the_reference_does():
    *qkv, among_BTS = made(1, 1, 130, 16, 16, jnp.bfloat16)
    found = graded(lambda *qkv: attend_gpu(*qkv, pack(among_BTS), Tiles(interpret=STRICT)), *qkv)
    for one, other in zip(
        found, graded(lambda *qkv: attend_reference(*qkv, pack(among_BTS)), *qkv), strict=True
    ):
        scale = np.max(np.abs(other.astype(jnp.float32)))
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), atol=0.02 * scale
        )  # 8 bits, and of probabilities too


def test_it_lowers_for_a_gpu_without_its_compiler():
    """As far as Mosaic's own code: layouts, shared memory, barriers. What the GPU's compiler makes
    of that is tests/compile/test_gpu_kernels.py.
    """

    def gradients(q, k, v, bits):
        return jax.grad(
            lambda *qkv: jnp.sum(attend_gpu(*qkv, bits)[0].astype(jnp.float32)), (0, 1, 2)
        )(q, k, v)

    heads = [jax.ShapeDtypeStruct((1, 2, 512, width), jnp.bfloat16) for width in (192, 192, 128)]
    exported = export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=CUSTOM)(
        *heads, jax.ShapeDtypeStruct((1, 512, 128), jnp.int32)
    )
    assert exported.mlir_module().count("custom_call @mosaic_gpu_v2") == 3, "forward, dq, dk and dv"


def test_float32_is_refused_on_a_gpu():
    *qkv, among_BTS = made(1, 1, 64, 16, 16)
    with pytest.raises(TypeError, match="float32"):
        attend_gpu(*qkv, pack(among_BTS))


@pytest.mark.slow
def test_the_bench_measures_every_way_and_asks_for_a_gpu(monkeypatch):
    """At a tiny size, on a CPU, with the reference in the kernel's place."""
    monkeypatch.setattr(bench.gpu, "REPEATS", 1)
    monkeypatch.setattr(bench.gpu, "DENSE", 256)
    sizes = bench.gpu.Sizes(
        heads=2,
        qk=24,
        v=16,
        latent=40,
        value=32,
        index_heads=2,
        index=8,
        topk=64,
        batch=2,
        chunk=64,
    )
    shrunk = bench.gpu.differences(
        lambda q, k, v, bits: attend_reference(q, k, v * 1.25, bits), sizes, L=128
    )
    assert shrunk["lse"] == 0 and 0.24 < shrunk["out"] < 0.26 and 0.2 < shrunk["dv"] < 0.3, (
        "of a kernel that is wrong by a quarter in v"
    )
    rows = bench.gpu.rows_of(256, sizes, 1e9, attend_reference)
    assert not [row for row in rows if "failed" in row]
    kinds = [row["what"].partition(",")[0] for row in rows]
    assert kinds == ["kernel", "kernel backward"] * 2 + ["masked in chunks"] * 2 + [
        "gather",
        "select",
        "top_k",
        "decode",
    ]
    among_BTS = unpack(bench.gpu.chosen(512, 64, scattered=True), 512)
    assert (
        not np.any(np.triu(among_BTS[0], 1))
        and 50 < np.mean(np.sum(among_BTS[0, 128:], axis=-1)) < 78
    ), "64 expected, of a past that is longer"
    with pytest.raises(UserError, match="needs a GPU"):
        bench.gpu.run(heads=2)
