"""bench.gpu without a GPU."""

import numpy as np
import pytest

import bench.gpu
from errors import UserError
from kernels.bitmask import unpack
from kernels.sparse_attention import attend_reference


@pytest.mark.slow
def test_the_bench_measures_every_implementation_and_asks_for_a_gpu(monkeypatch):
    """It runs at a tiny size, on a CPU, with the reference in the kernel's place."""
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
        "a kernel that is wrong by a quarter in v"
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
    selected_BTS = unpack(bench.gpu.selection_bits(512, 64, scattered=True), 512)
    assert (
        not np.any(np.triu(selected_BTS[0], 1))
        and 50 < np.mean(np.sum(selected_BTS[0, 128:], axis=-1)) < 78
    ), "64 expected, of a past that is longer"
    with pytest.raises(UserError, match="needs a GPU"):
        bench.gpu.run(heads=2)
