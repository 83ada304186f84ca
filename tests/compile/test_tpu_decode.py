"""The decoding kernels compiled for every TPU, at DeepSeek-V3.2's sizes.

A decode step with them in it copies no cache. Compiled, not run, as in test_tpu_kernels.py.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels.decode_selection import list_selected_tpu
from kernels.sparse_decode import decode_tpu
from tests.compile.ahead_of_time import (
    BF16,
    CHIPS,
    F32,
    assert_cache_is_written_in_place,
    compile_decode_step,
    compiled,
    temporary_bytes,
    text_of,
    tpu_mesh,
    v32_without_experts,
)

pytestmark = pytest.mark.compile

V4 = "v4:2x2x1"  # its 16 MiB of vector memory are enough for decoding
I, C, R, V, TOPK = 64, 128, 576, 512, 2_048
MIB = 2**20


@pytest.mark.parametrize(
    ("heads", "num_splits", "S", "topology"),
    [
        *((*case, chip) for case in ((128, 1, 4_096), (16, 1, 32_768)) for chip in CHIPS),
        *((128, 2, 131_072, chip) for chip in (V4, *CHIPS)),
    ],
)
def test_sparse_decode(heads, num_splits, S, topology):
    B = 3 - num_splits

    def decode(q, tiles, index, count):
        return decode_tpu(q, tiles, V, index, count, num_splits=num_splits)

    program = compiled(
        topology,
        decode,
        ((B, heads, R), BF16),
        ((B, S, 3, 2, 128), BF16),
        ((B, TOPK), jnp.int32),
        ((B,), jnp.int32),
    )
    assert temporary_bytes(program) < 2 * MIB, (
        "no copy of the cache, not even of what is read of it"
    )


@pytest.mark.parametrize(
    ("top_p", "S", "topology"),
    [
        *((*case, chip) for case in ((0.9, 4_096), (1.0, 32_768)) for chip in CHIPS),
        *((0.9, 131_072, chip) for chip in (V4, *CHIPS)),
    ],
)
def test_selection_of_one_query(top_p, S, topology):
    shapes = ((2, I, C), BF16), ((2, S, C), BF16), ((2, I), F32), ((2, S), jnp.bool_)
    program = compiled(
        topology, functools.partial(list_selected_tpu, topk=TOPK, top_p=top_p), *shapes
    )
    assert temporary_bytes(program) < 4 * MIB, (
        "the allowed tokens as words, and no copy of the keys"
    )


def test_at_the_highest_precision_bfloat16_stays_what_it_is():
    """launch.score --exact sets it for everything: Mosaic refuses a product of bfloat16 at that
    precision, and the list is made by such products.
    """
    shapes = ((2, I, C), BF16), ((2, 4_096, C), BF16), ((2, I), F32), ((2, 4_096), jnp.bool_)
    with jax.default_matmul_precision("highest"):
        compiled("v6e:2x2", functools.partial(list_selected_tpu, topk=TOPK), *shapes)


@pytest.mark.parametrize(
    ("heads", "I", "C", "R", "V", "topk"),
    [
        pytest.param(8, 4, 32, 80, 64, 64, id="base"),
        pytest.param(128, 64, 128, 576, 512, TOPK, id="V3.2", marks=pytest.mark.slow),
    ],
)
def test_in_float32(heads, I, C, R, V, topk):
    """The widths are those of configs/base.py, and what launch.score --exact makes of V3.2."""
    B, S = 2, 16_384
    compiled(
        "v6e:2x2",
        functools.partial(list_selected_tpu, topk=topk),
        ((B, I, C), F32),
        ((B, S, C), F32),
        ((B, I), F32),
        ((B, S), jnp.bool_),
    )
    compiled(
        "v6e:2x2",
        lambda q, tiles, index, count: decode_tpu(q, tiles, V, index, count),
        ((B, heads, R), F32),
        ((B, S, -(-R // 256), 2, 128), F32),
        ((B, topk), jnp.int32),
        ((B,), jnp.int32),
    )


def test_a_decode_step_copies_no_cache():
    """Rows have 128K slots, and heads are sharded over four chips."""
    rows, slots = 4, 131_072
    program, cache = compile_decode_step(
        tpu_mesh("v6e:2x2", tensor=4), v32_without_experts(layers=2), rows, slots
    )
    assert cache.layers[0].attention.latent_BSR.shape == (rows, slots, 3, 2, 128), (
        "tiles, since it is compiled for a TPU"
    )
    text = text_of(program)
    assert "sparse_decode" in text and "decode_select" in text and " sort(" not in text
    smaller = rows * slots * C * 2  # of a layer's two arrays, the indexer's keys: 128 MiB
    assert temporary_bytes(program) < smaller // 2, "some weights in another layout, no cache"
    assert_cache_is_written_in_place(program, cache)
