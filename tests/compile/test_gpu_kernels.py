"""Every kernel compiled for an H200, at DeepSeek-V3.2's sizes, by XLA's CUDA plugin and ptxas.

NVIDIA's compiler says what it makes of a kernel: registers that did not suffice, products that wait
for each other. Compiled, not run, and without a GPU. Skipped where the compilers are not installed:
`make test-compile` installs them.
"""

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kernels.bitmask import num_words
from kernels.reference import IndexerQuery
from kernels.sparse_attention_gpu import attend_gpu
from model.attention.reference import IndexerInputs
from model.attention.tiled import CHUNK_BYTES, KERNELS, attend_tiled
from model.sharding import MESH_AXES
from tests.compile.ahead_of_time import (
    BF16,
    F32,
    assert_cache_is_written_in_place,
    compile_decode_step,
    compiled,
    temporary_bytes,
    text_of,
    v32_without_experts,
)

MISSING = [
    name
    for name, there in (
        ("jax-cuda13-plugin", importlib.util.find_spec("jax_cuda13_plugin")),
        ("ptxas", shutil.which("ptxas")),
    )
    if not there
]
NO_COMPILER = (
    f"no compiler for NVIDIA GPUs, {' and '.join(MISSING)} not found: "
    "make test-compile installs them"
)
pytestmark = [pytest.mark.compile, pytest.mark.skipif(bool(MISSING), reason=NO_COMPILER)]

I, C, H, V, TOPK = 64, 128, 192, 128, 2_048  # V3.2's indexer and, expanded, its attention
# What XLA asks of a GPU when there is one: NVIDIA's data sheet, and the limits of compute
# capability 9.0 (CUDA programming guide).
H200 = """gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150754820096
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """Makes the directory where ptxas leaves its report of each Mosaic kernel.

    It is set before the plugin is loaded, which reads it once.
    """
    directory = tmp_path_factory.mktemp("ptxas")
    os.environ |= {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_TO": str(directory),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    return directory


@pytest.fixture(scope="module")
def h200(reports) -> Iterator[Mesh]:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=H200
    ).devices
    # What is found in the cache comes without a report.
    jax.config.update("jax_enable_compilation_cache", False)
    yield Mesh(
        np.array(devices[:1]).reshape(1, 1, 1, 1),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )
    jax.config.update("jax_enable_compilation_cache", True)


def bytes_of_arrays(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes of every array in a program, those inside fusions too, by how it is
    written: "bf16[1,16,4096,192]".
    """
    size = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
    found = re.findall(rf"\b(({'|'.join(size)})\[([\d,]*)\])", text_of(program))
    return {
        whole: size[kind] * math.prod(int(one) for one in shape.split(",") if one)
        for whole, kind, shape in found
    }


@pytest.mark.parametrize(
    ("L", "heads"), [(4_096, 128), pytest.param(32_768, 16, marks=pytest.mark.slow)]
)
def test_sparse_attention_forward_and_backward(h200, reports, L, heads):
    for old in reports.glob("*.ptxas"):
        old.unlink()

    def gradients(q, k, v, bits):
        def total(q, k, v):
            out, lse = attend_gpu(q, k, v, bits)
            return jnp.sum(out.astype(F32)) + jnp.sum(lse)

        return jax.grad(total, (0, 1, 2))(q, k, v)

    program = compiled(
        h200,
        gradients,
        *[((1, heads, L, width), BF16) for width in (H, H, V)],
        ((1, L, num_words(L)), jnp.int32),
    )
    arrays = L * heads * (2 * H + 2 * V) * 2  # of one pass: q, k, v, out
    assert temporary_bytes(program) < arrays + 4 * L * L // 8, (
        "a few arrays of the inputs' size, and of L x L bits alone"
    )
    assert not [array for array in bytes_of_arrays(program) if array.count(str(L)) > 1], (
        "none of L x L, however many its heads"
    )

    report_of = {
        re.sub(r"_\d+$", "", file.stem): file.read_text() for file in reports.glob("*.ptxas")
    }
    assert sorted(report_of) == ["sparse_attention", "sparse_attention_dkv", "sparse_attention_dq"]
    assert all("serialized" not in report for report in report_of.values()), (
        "a product waits for the one before it"
    )
    spilled = {}
    for name, report in report_of.items():
        found = re.search(r"(\d+) bytes spill stores", report)
        assert found, report
        spilled[name] = int(found[1])
    assert spilled["sparse_attention"] == spilled["sparse_attention_dq"] == 0
    assert spilled["sparse_attention_dkv"] < 300, (
        "of scalars: 160 of its 240 registers hold dk and dv"
    )


def assert_no_sort(program):
    """Asserts that there is neither XLA's own, nor NVIDIA's that it may take in its place."""
    assert not re.search(r"\bsort\(|RadixSort|TopK", text_of(program))


@pytest.mark.parametrize("L", [4_096, 131_072])
def test_selection(h200, L):
    shapes = [
        ((1, L, I, C), BF16),
        ((1, L, C), BF16),
        ((1, L, I), F32),
        *[((1, L), jnp.int32)] * 2,
        ((L,), jnp.int32),
    ]
    program = compiled(h200, lambda *inputs: KERNELS["gpu"].select(*inputs, TOPK), *shapes)
    assert_no_sort(program)
    assert temporary_bytes(program) < 2 * L * I * C * 2 + 3 * CHUNK_BYTES, (
        "a chunk's products of every head, not all queries'"
    )


def test_the_sparse_stage_over_128k(h200):
    """It has selection, attention of 16 heads and the loss, forward and backward. The largest
    arrays are the bitmask, and the indexer's queries in float32.
    """
    L, heads = 131_072, 16

    def gradients(q, k, v, iq, w, ik, segments):
        def total(q, k, v, iq, w, ik):
            inputs = q, k, v, segments, IndexerInputs(IndexerQuery(iq, w), ik)
            out, report, _ = attend_tiled(
                *inputs, stage="sparse", topk=TOPK, kernels=KERNELS["gpu"]
            )
            return jnp.sum(out.astype(F32)) + report.kl

        return jax.grad(total, range(6))(q, k, v, iq, w, ik)

    attention = [((1, L, heads, width), BF16) for width in (H, H, V)]
    program = compiled(
        h200,
        gradients,
        *attention,
        ((1, L, I, C), BF16),
        ((1, L, I), F32),
        ((1, L, C), BF16),
        ((1, L), jnp.int32),
    )
    arrays, bits, index_q = bytes_of_arrays(program), 4 * L * num_words(L), 4 * L * I * C
    assert not [array for array in arrays if array.count(str(L)) > 1]
    assert max(arrays.values()) <= max(bits, index_q)
    assert temporary_bytes(program) < L * L, (
        "all together less than an array of L x L would have in bytes"
    )


def test_a_decode_step_neither_sorts_nor_copies_the_cache(h200):
    """It has two layers of V3.2, and rows of 128K slots."""
    program, cache = compile_decode_step(h200, v32_without_experts(layers=2), rows=2, slots=131_072)
    assert cache.layers[0].attention.latent_BSR.shape == (2, 131_072, 576), (
        "rows: the kernels are a TPU's"
    )
    assert_no_sort(program)
    assert_cache_is_written_in_place(program, cache)
    assert temporary_bytes(program) < 2 * 131_072 * 576 * 2, "no copy of one"
