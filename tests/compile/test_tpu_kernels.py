"""The TPU's own compiler takes every kernel, for every chip, at DeepSeek-V3.2's sizes: what it refuses (an operation it lacks, too much VMEM) the interpreter
would run. Compiled, not run: `make test-compile` installs the compiler, which needs no TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.topology import GIB, topology_devices
from model.kernels import indexer_kl, sparse_attention
from model.kernels.keyset import words
from model.kernels.selection import select_tpu

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
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P())) for shape, dtype in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile()


def indexer(L: int) -> list:
    """Shapes of q, w, k."""
    return [((1, L, I, C), BF16), ((1, L, I), F32), ((1, L, C), BF16)]


def attention(L: int, heads: int, heads_of_keys: int = 0) -> list:
    """Shapes of q, k, v."""
    return [((1, own, L, width), BF16) for own, width in ((heads, H), (heads_of_keys or heads, H), (heads_of_keys or heads, V))]


@pytest.mark.parametrize("L", [4_096, pytest.param(32_768, marks=SLOW), 131_072])
@pytest.mark.parametrize("topology", CHIPS)
def test_selection(topology, L):
    q, w, k = indexer(L)
    program = compiled(topology, functools.partial(select_tpu, topk=TOPK), q, k, w, *[((1, L), jnp.int32)] * 2, ((L,), jnp.int32))
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes < L * (words(L) + 2) * 4, "a bit a key, and a threshold"
    assert memory.temp_size_in_bytes < 2 * L * I * C * 2 + GIB // 4, "nothing of L x L but the bits: the queries, heads first, and little else"


@pytest.mark.parametrize(
    ("L", "heads", "heads_of_keys"), [(4_096, 128, 128), (4_096, 16, 16), (4_096, 16, 2), pytest.param(32_768, 16, 16, marks=SLOW), (131_072, 16, 16)]
)
@pytest.mark.parametrize("topology", CHIPS)
def test_sparse_attention_forward_and_backward(topology, L, heads, heads_of_keys):
    def gradients(q, k, v, bits):
        def total(q, k, v):
            out, lse = sparse_attention.attend_tpu(q, k, v, bits)
            return jnp.sum(out.astype(F32)) + jnp.sum(lse)

        return jax.grad(total, (0, 1, 2))(q, k, v)

    program = compiled(topology, gradients, *attention(L, heads, heads_of_keys), ((1, L, words(L)), jnp.int32))
    arrays = L * heads * (2 * H + 2 * V) * 2  # of one pass: q, k, v, out
    assert program.memory_analysis().temp_size_in_bytes < 2 * arrays + GIB, "a few arrays of the inputs' size, none of L x L"


@pytest.mark.parametrize(("L", "heads"), [(4_096, 16), (4_096, 128), pytest.param(32_768, 16, marks=SLOW), (131_072, 16)])
@pytest.mark.parametrize("topology", CHIPS)
def test_indexer_kl_and_its_gradients(topology, L, heads):
    q, k, _ = attention(L, heads)
    iq, w, ik = indexer(L)

    def gradients(q, k, lse, iq, w, ik, bits, selected):
        attention = indexer_kl.Attention(q, k, lse)
        return jax.value_and_grad(indexer_kl.total_kl_tpu, (1, 2, 3), has_aux=True)(attention, iq, w, ik, bits, selected)

    program = compiled(topology, gradients, q, k, ((1, heads, L), F32), iq, w, ik, *[((1, L, words(L)), jnp.int32)] * 2)
    assert program.memory_analysis().temp_size_in_bytes < 8 * L * I * C + GIB, "the indexer's queries and their gradient, none of L x L"


def test_two_rows_of_128k_come_one_by_one():
    """Their tables of tiles do not fit into a chip's scalar memory together."""
    L, heads = 131_072, 2
    q, k, v = attention(L, heads)
    iq, w, ik = indexer(L)
    bits = ((1, L, words(L)), jnp.int32)

    def loss(iq, w, ik, q, k, v, bits):
        out, lse = sparse_attention.attend_tpu(q, k, v, bits)
        return indexer_kl.total_kl_tpu(indexer_kl.Attention(q, k, lse), iq, w, ik, bits, bits)[0] + jnp.sum(out.astype(F32))

    compiled("v5e:2x2", loss, *(((2, *shape[1:]), dtype) for shape, dtype in (iq, w, ik, q, k, v, bits)))


def test_a_block_that_is_too_large_is_refused():
    """The plant of these checks: the interpreter runs such a block without a word."""
    L = 131_072
    q, w, k = indexer(L)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiled("v5p:2x2x1", functools.partial(select_tpu, topk=TOPK, queries=128), q, k, w, *[((1, L), jnp.int32)] * 2, ((L,), jnp.int32))
