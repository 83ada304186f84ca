"""Every kernel compiled for every TPU, at DeepSeek-V3.2's sizes.

The TPU's own compiler refuses what the interpreter would run: an operation it lacks, too much
vector memory. Compiled, not run: `make test-compile` installs the compiler, which needs no TPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from kernels import indexer_kl, sparse_attention
from kernels.bitmask import num_words
from kernels.selection import select_tpu
from tests.compile.ahead_of_time import (
    BF16,
    CHIPS,
    F32,
    compiled,
    config_of,
    temporary_bytes,
    text_of,
)

pytestmark = pytest.mark.compile

I, C, H, V, TOPK = 64, 128, 192, 128, 2_048  # V3.2's indexer and, expanded, its attention
SLOW = pytest.mark.slow  # between a small size and the largest: `make test-compile-all`


def indexer(L: int, I: int = I, C: int = C, dtype=BF16) -> list:
    """Returns the shapes of q, k and w."""
    return [((1, L, I, C), dtype), ((1, L, C), dtype), ((1, L, I), F32)]


def attention(L: int, heads: int, key_heads: int = 0, H: int = H, V: int = V, dtype=BF16) -> list:
    """Returns the shapes of q, k and v."""
    key_heads = key_heads or heads
    return [
        ((1, own, L, width), dtype) for own, width in ((heads, H), (key_heads, H), (key_heads, V))
    ]


def select(topology: str, q, k, w, topk: int = TOPK, **options):
    L = q[0][1]
    segments, positions = ((1, L), jnp.int32), ((L,), jnp.int32)
    function = functools.partial(select_tpu, topk=topk, **options)
    return compiled(topology, function, q, k, w, segments, segments, positions)


def gradients_of_attention(topology: str, q, k, v):
    def gradients(q, k, v, bits):
        def total(q, k, v):
            out, lse = sparse_attention.attend_tpu(q, k, v, bits)
            return jnp.sum(out.astype(F32)) + jnp.sum(lse)

        return jax.grad(total, (0, 1, 2))(q, k, v)

    B, _, L, _ = q[0]
    return compiled(topology, gradients, q, k, v, ((B, L, num_words(L)), jnp.int32))


def gradients_of_loss(topology: str, q, k, iq, ik, w):
    def gradients(q, k, lse, iq, ik, w, bits, selected):
        attention = indexer_kl.MainAttention(q, k, lse)
        return jax.value_and_grad(indexer_kl.total_kl_tpu, (1, 2, 3), has_aux=True)(
            attention, iq, ik, w, bits, selected
        )

    B, _, L, _ = q[0]
    return compiled(
        topology,
        gradients,
        q,
        k,
        (q[0][:3], F32),
        iq,
        ik,
        w,
        *[((B, L, num_words(L)), jnp.int32)] * 2,
    )


def assert_memory(program, L: int, needed: int):
    """Asserts that no array is L x L, by its shape and by memory.

    In another shape one of bytes would be twice the margin, where it comes on top of all that is
    needed; a compiler that keeps some of that in VMEM leaves more.
    """
    assert temporary_bytes(program) < needed + L * L // 2
    assert not re.search(rf"\w+\[(?:\d+,)*{L},(?:\d+,)*{L}(?:,\d+)*\]", text_of(program))


@pytest.mark.parametrize("L", [4_096, pytest.param(32_768, marks=SLOW), 131_072])
@pytest.mark.parametrize("topology", CHIPS)
def test_selection(topology, L):
    program = select(topology, *indexer(L))
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes < L * (num_words(L) + 2) * 4, "a bit a key, and a threshold"
    assert_memory(program, L, needed=L * I * C * 2)  # the queries, heads first


@pytest.mark.parametrize(
    ("L", "heads", "key_heads"),
    [
        (4_096, 128, 128),
        (4_096, 16, 2),
        *(pytest.param(L, 16, 16, marks=SLOW) for L in (4_096, 32_768)),
        (131_072, 16, 16),
    ],
)
@pytest.mark.parametrize("topology", CHIPS)
def test_sparse_attention_forward_and_backward(topology, L, heads, key_heads):
    program = gradients_of_attention(topology, *attention(L, heads, key_heads))
    # Sums for each head of keys, where a program has not all the heads that it serves.
    sums = 2 * (heads // key_heads > 4)
    # dq in float32 and turned, out, its cotangent and one more of their size; sums of dk and dv in
    # float32, 192 lanes in two registers.
    needed = L * heads * (8 * H + 6 * V) + sums * key_heads * L * (256 + V) * 4
    assert_memory(program, L, needed)


@SLOW
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_attention_of_all_heads_over_128k(topology):
    """These chips have room for its operands: 45 GiB with the gradients."""
    gradients_of_attention(topology, *attention(131_072, 128))


@pytest.mark.parametrize(
    ("L", "heads"), [(4_096, 16), (4_096, 128), pytest.param(32_768, 16, marks=SLOW), (131_072, 16)]
)
@pytest.mark.parametrize("topology", CHIPS)
def test_indexer_kl_and_its_gradients(topology, L, heads):
    program = gradients_of_loss(topology, *attention(L, heads)[:2], *indexer(L))
    # The indexer's queries, heads first, and their gradient in float32 and as it is; q and k of
    # more heads than come at once, once more.
    assert_memory(program, L, needed=8 * L * I * C + L * heads * (4 * H + 256))


@pytest.mark.parametrize(
    ("heads", "key_heads", "H", "V", "dtype"),
    [
        pytest.param(32, 8, 128, 128, BF16, id="Qwen3"),
        pytest.param(16, 2, 256, 256, BF16, id="Qwen3-Next"),
        pytest.param(32, 8, 128, 128, F32, id="Qwen3 in float32", marks=SLOW),
        pytest.param(16, 2, 256, 256, F32, id="Qwen3-Next in float32", marks=SLOW),
        pytest.param(16, 16, H, V, F32, id="V3.2 in float32", marks=SLOW),
    ],
)
def test_attention_of_other_widths(heads, key_heads, H, V, dtype):
    gradients_of_attention("v6e:2x2", *attention(1_024, heads, key_heads, H, V, dtype))


@pytest.mark.parametrize("name", ["base", "moe_16b", pytest.param("deepseek_v32", marks=SLOW)])
def test_kernels_of_a_config_in_its_dtype(name):
    """These are what "auto" sends to the kernels: base is float32, heads 48 and 32 wide, its
    indexer 32; moe_16b's indexer is 64 wide; V3.2 is as launch.score --exact has it.
    """
    config, L = config_of(name), 1_024
    mla, dtype = config.mla, F32 if name == "deepseek_v32" else jnp.dtype(config.dtype)
    width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    q, k, v = attention(L, min(mla.num_attention_heads, 16), 0, width, mla.v_head_dim, dtype)
    iq, ik, w = indexer(L, config.indexer.n_heads, config.indexer.head_dim, dtype)
    select("v6e:2x2", iq, ik, w, topk=config.indexer.topk)
    gradients_of_loss("v6e:2x2", q, k, iq, ik, w)
    if (width, dtype) != (H, BF16):
        gradients_of_attention("v6e:2x2", q, k, v)


def test_many_rows_have_room_in_scalar_memory():
    """There are 128 rows of 4K on one chip: a line of their tables of tiles, 8 of attention's and
    16 of the loss's, takes 128 words.
    """
    rows = [
        [((128, *shape[1:]), dtype) for shape, dtype in shapes]
        for shapes in (attention(4_096, 1), indexer(4_096, I=2))
    ]
    gradients_of_attention("v6e:2x2", *rows[0])
    gradients_of_loss("v6e:2x2", *rows[0][:2], *rows[1])


def test_two_rows_of_128k_come_one_by_one():
    """Their tables of tiles do not fit into a chip's scalar memory together."""
    L, heads = 131_072, 2
    q, k, v = attention(L, heads)
    iq, ik, w = indexer(L)
    bits = ((1, L, num_words(L)), jnp.int32)

    def loss(iq, ik, w, q, k, v, bits):
        out, lse = sparse_attention.attend_tpu(q, k, v, bits)
        attention = indexer_kl.MainAttention(q, k, lse)
        kl, *_ = indexer_kl.total_kl_tpu(attention, iq, ik, w, bits, bits)
        return kl + jnp.sum(out.astype(F32))

    rows = (((2, *shape[1:]), dtype) for shape, dtype in (iq, ik, w, q, k, v, bits))
    compiled("v5e:2x2", loss, *rows)


def test_a_block_that_is_too_large_is_refused():
    """So these tests can fail: the interpreter runs such a block without a word."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        select("v5p:2x2x1", *indexer(131_072), queries=128)
