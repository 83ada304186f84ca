"""The TPU's own compiler takes every kernel, for every chip, at DeepSeek-V3.2's sizes: what it
refuses (an operation it lacks, too much VMEM) the interpreter would run. Compiled, not run: `make
test-compile` installs the compiler, which needs no TPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiment.config_files import get_config
from experiment.schema import build
from kernels import indexer_kl, sparse_attention
from kernels.bitmask import words
from kernels.selection import select_tpu
from model.config import ModelConfig
from plan.topology import topology_devices

pytestmark = pytest.mark.compile

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
I, C, H, V, TOPK = 64, 128, 192, 128, 2_048  # V3.2's indexer and, expanded, its attention
BF16, F32 = jnp.bfloat16, jnp.float32
SLOW = pytest.mark.slow  # between a small size and the largest: `make test-compile-all`


@functools.cache
def one_device(topology: str) -> Mesh:
    return Mesh(np.array(topology_devices(topology)[:1]), ("one",))


def compiled(topology: str, function, *shapes):
    """For one device of a topology; `shapes`: (shape, dtype) of each argument."""
    mesh = one_device(topology)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile()


def indexer(L: int, I: int = I, C: int = C, dtype=BF16) -> list:
    """Shapes of q, w, k."""
    return [((1, L, I, C), dtype), ((1, L, I), F32), ((1, L, C), dtype)]


def attention(
    L: int, heads: int, heads_of_keys: int = 0, H: int = H, V: int = V, dtype=BF16
) -> list:
    """Shapes of q, k, v."""
    return [
        ((1, own, L, width), dtype)
        for own, width in ((heads, H), (heads_of_keys or heads, H), (heads_of_keys or heads, V))
    ]


def select(topology: str, q, w, k, topk: int = TOPK, **options):
    row = (1, q[0][1]), jnp.int32
    return compiled(
        topology,
        functools.partial(select_tpu, topk=topk, **options),
        q,
        k,
        w,
        row,
        row,
        (row[0][1:], jnp.int32),
    )


def gradients_of_attention(topology: str, q, k, v):
    def gradients(q, k, v, bits):
        def total(q, k, v):
            out, lse = sparse_attention.attend_tpu(q, k, v, bits)
            return jnp.sum(out.astype(F32)) + jnp.sum(lse)

        return jax.grad(total, (0, 1, 2))(q, k, v)

    B, _, L, _ = q[0]
    return compiled(topology, gradients, q, k, v, ((B, L, words(L)), jnp.int32))


def gradients_of_loss(topology: str, q, k, iq, w, ik):
    def gradients(q, k, lse, iq, w, ik, bits, selected):
        attention = indexer_kl.Attention(q, k, lse)
        return jax.value_and_grad(indexer_kl.total_kl_tpu, (1, 2, 3), has_aux=True)(
            attention, iq, w, ik, bits, selected
        )

    B, _, L, _ = q[0]
    return compiled(
        topology, gradients, q, k, (q[0][:3], F32), iq, w, ik, *[((B, L, words(L)), jnp.int32)] * 2
    )


def assert_memory(program, L: int, needed: int):
    """No array is L x L, by its shape. In another shape one of bytes would be twice the margin,
    where it comes on top of all that is needed; a compiler that keeps some of that in VMEM leaves
    more.
    """
    assert program.memory_analysis().temp_size_in_bytes < needed + L * L // 2
    assert not re.search(rf"\w+\[(?:\d+,)*{L},(?:\d+,)*{L}(?:,\d+)*\]", program.as_text())


@pytest.mark.parametrize("L", [4_096, pytest.param(32_768, marks=SLOW), 131_072])
@pytest.mark.parametrize("topology", CHIPS)
def test_selection(topology, L):
    program = select(topology, *indexer(L))
    assert program.memory_analysis().output_size_in_bytes < L * (words(L) + 2) * 4, (
        "a bit a key, and a threshold"
    )
    assert_memory(program, L, needed=L * I * C * 2)  # the queries, heads first


@pytest.mark.parametrize(
    ("L", "heads", "heads_of_keys"),
    [
        (4_096, 128, 128),
        (4_096, 16, 2),
        *(pytest.param(L, 16, 16, marks=SLOW) for L in (4_096, 32_768)),
        (131_072, 16, 16),
    ],
)
@pytest.mark.parametrize("topology", CHIPS)
def test_sparse_attention_forward_and_backward(topology, L, heads, heads_of_keys):
    program = gradients_of_attention(topology, *attention(L, heads, heads_of_keys))
    parts = 2 * (
        heads // heads_of_keys > 4
    )  # of each head of keys, where a program has not all that it serves
    # dq in float32 and turned, out, its cotangent and one more of their size; parts of dk and dv in
    # float32, 192 lanes in two registers.
    assert_memory(
        program, L, needed=L * heads * (8 * H + 6 * V) + parts * heads_of_keys * L * (256 + V) * 4
    )


@SLOW
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_attention_of_all_heads_over_128k(topology):
    """Those that have room for its operands: 45 GiB with the gradients."""
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
    ("heads", "heads_of_keys", "H", "V", "dtype"),
    [
        pytest.param(32, 8, 128, 128, BF16, id="Qwen3"),
        pytest.param(16, 2, 256, 256, BF16, id="Qwen3-Next"),
        pytest.param(32, 8, 128, 128, F32, id="Qwen3 in float32", marks=SLOW),
        pytest.param(16, 2, 256, 256, F32, id="Qwen3-Next in float32", marks=SLOW),
        pytest.param(16, 16, H, V, F32, id="V3.2 in float32", marks=SLOW),
    ],
)
def test_attention_of_other_widths(heads, heads_of_keys, H, V, dtype):
    gradients_of_attention("v6e:2x2", *attention(1_024, heads, heads_of_keys, H, V, dtype))


@pytest.mark.parametrize("name", ["base", "moe_16b", pytest.param("deepseek_v32", marks=SLOW)])
def test_kernels_of_a_config_in_its_dtype(name):
    """What "auto" sends to them: base is float32, heads 48 and 32 wide, its indexer 32; moe_16b's
    indexer is 64 wide. V3.2 as launch.score --exact has it.
    """
    c, L = build(ModelConfig, get_config(f"configs/{name}.py").model, "config.model"), 1_024
    a, dtype = c.attention, F32 if name == "deepseek_v32" else jnp.dtype(c.dtype)
    q, k, v = attention(L, min(a.heads, 16), 0, a.nope_width + a.rope_width, a.value_width, dtype)
    iq, w, ik = indexer(L, c.indexer.heads, c.indexer.width, dtype)
    select("v6e:2x2", iq, w, ik, topk=c.indexer.topk)
    gradients_of_loss("v6e:2x2", q, k, iq, w, ik)
    if (a.nope_width + a.rope_width, dtype) != (H, BF16):
        gradients_of_attention("v6e:2x2", q, k, v)


def test_many_rows_have_room_in_scalar_memory():
    """128 rows of 4K on one chip: a line of their tables of tiles, 8 of attention's and 16 of the
    loss's, takes 128 words.
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
    iq, w, ik = indexer(L)
    bits = ((1, L, words(L)), jnp.int32)

    def loss(iq, w, ik, q, k, v, bits):
        out, lse = sparse_attention.attend_tpu(q, k, v, bits)
        return indexer_kl.total_kl_tpu(indexer_kl.Attention(q, k, lse), iq, w, ik, bits, bits)[
            0
        ] + jnp.sum(out.astype(F32))

    compiled(
        "v5e:2x2", loss, *(((2, *shape[1:]), dtype) for shape, dtype in (iq, w, ik, q, k, v, bits))
    )


def test_a_block_that_is_too_large_is_refused():
    """The plant of these checks: the interpreter runs such a block without a word."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        select("v5p:2x2x1", *indexer(131_072), queries=128)
