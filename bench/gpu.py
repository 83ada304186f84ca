"""Measures every implementation of sparse attention on a GPU, at DeepSeek-V3.2's widths.

    python -m bench.gpu                    128 heads: one device has them all
    python -m bench.gpu --heads=16         as with eight devices that share them

Its figures are to decide the table of implementations. For each length it measures

- the masked kernel forward and backward, on keys scattered over the whole past (no tile is empty)
  and on the last ones alone (most are);
- plain XLA masked, in chunks of queries, up to DENSE tokens;
- for reading, XLA's gather of the selected latents and two batched products (`gather`);
- for writing, one step in two parts: the selection of the latents from the indexer's keys, by the
  search for its threshold and a list (`select`) or by a sort (`top_k`), and attention over a list
  at random (`decode`).

TFLOP/s counts what is computed: for the kernel the pairs in tiles that it visits. GB/s counts what
must be read once, and its share is of what a copy in memory reaches. First the kernel's values and
gradients are compared with the reference's (`differs`: 0.02 is bfloat16's). One JSON line, medians
of 10 calls, fewer beyond 32K tokens; nothing is written. Needs a Hopper GPU.
"""

import functools
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bench.workload import REPEATS, seconds
from errors import UserError
from experiment.command_line import Flag, command
from kernels import decode_selection
from kernels.bitmask import along_keys, num_words, pack
from kernels.hopper_memory import BLOCK
from kernels.hopper_pipeline import nonempty_first
from kernels.reference import indexer_scores, masked_scores
from kernels.sparse_attention import attend_reference
from kernels.sparse_attention_gpu import Tiles, attend_gpu
from kernels.sparse_decode import decode_reference

LENGTHS = (4_096, 8_192, 32_768, 65_536, 131_072)
DENSE = 65_536  # tokens: of 128K every pair is 1.4 PFLOP forward alone
MASK_ROWS = 256  # rows of a mask that are made at a time

Attend = Callable[[Array, Array, Array, Array], tuple[Array, Array]]  # as `attend_gpu`


class Sizes(NamedTuple):
    """The widths of DeepSeek-V3.2 (arXiv 2512.02556), and the sizes of a step."""

    heads: int
    qk: int = 192  # width of an expanded head's queries and keys
    v: int = 128
    latent: int = 576  # with the RoPE channels
    value: int = 512  # without them
    index_heads: int = 64
    index: int = 128
    topk: int = 2_048
    batch: int = 64  # sequences of a decoding step
    chunk: int = 128  # queries whose latents are gathered at a time


class Random:
    """Draws arrays, each from a fresh key."""

    def __init__(self, seed: int, dtype: Any):
        self.keys, self.dtype = iter(jax.random.split(jax.random.key(seed), 12)), dtype

    def normal(self, *shape: int) -> Array:
        """Draws an array whose rows have a length about 1 to 4; the last axis is a row."""

        # Compiled, since in float32 it may not fit.
        @jax.jit
        def draw(key):
            return (jax.random.normal(key, shape) * shape[-1] ** -0.25).astype(self.dtype)

        return draw(next(self.keys))

    def integers(self, shape: tuple[int, ...], below: Any) -> Array:
        """Draws integers from 0 on, below a number or an array of them."""
        return jax.random.randint(next(self.keys), shape, 0, below)


class Measurements:
    """The measurements of one length, a row each."""

    def __init__(self, length: int, copy_rate: float):
        self.length, self.rows = length, []
        self.copy_rate = copy_rate  # bytes a second that a copy reads and writes
        self.repeats = max(2, REPEATS * 32_768 // max(length, 32_768))

    def add(
        self,
        name: str,
        flops: float,
        needed: float,
        function: Callable,
        *arguments: Any,
        before: float = 0.0,
    ) -> float:
        """Times a compiled call and adds a row.

        Args:
          name: of the row.
          flops: that are computed.
          needed: bytes that must be read once.
          function: what is compiled and called with the arguments.
          *arguments: of the call.
          before: seconds of the call that do not count.

        Returns: the median in seconds beyond `before`; 0 where the call does not fit into memory,
        which its row says.
        """
        row = {"length": self.length, "what": name}
        try:
            compiled = jax.jit(function)
            times = seconds(lambda _: compiled(*arguments), self.repeats)
        except jax.errors.JaxRuntimeError as error:
            self.rows.append(row | {"failed": str(error).splitlines()[0][:200]})
            return 0.0
        took = statistics.median(times) - before
        speed = {
            "tflops": round(flops / took / 1e12, 1),
            "gb_s": round(needed / took / 1e9, 1),
            "of_copy": round(needed / took / self.copy_rate, 3),
        }
        self.rows.append(row | {"ms": round(took * 1e3, 3)} | speed)
        return took


def run(heads: int) -> None:
    """Measures every length and prints one JSON line.

    Raises UserError where there is no Hopper GPU.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(
            f"bench.gpu needs a GPU; JAX has {device.device_kind} here. "
            "On one: pip install 'jax[cuda13]'"
        )
    if device.compute_capability != "9.0":
        raise UserError(
            f"bench.gpu: {device.device_kind} has compute capability {device.compute_capability}; "
            "the kernel is for Hopper, 9.0"
        )
    differs = differences(attend_gpu, Sizes(heads))
    copy = copy_rate(2**30)
    rows = [row for L in LENGTHS for row in rows_of(L, Sizes(heads), copy, attend_gpu)]
    about = {
        "device": device.device_kind,
        "jax": version("jax"),
        "heads": heads,
        "copy_gb_s": round(copy / 1e9, 1),
        "differs": differs,
    }
    print(json.dumps({"bench": "gpu"} | about | {"rows": rows}))


def differences(
    attend: Attend, sizes: Sizes, L: int = 1_024, dtype: Any = jnp.bfloat16
) -> dict[str, float]:
    """Compares values and gradients with the reference's: what is wrong need not be fast.

    Returns: the largest difference of each array, as a share of the reference's largest value.
    """
    q, k, v = (
        jax.random.normal(jax.random.key(seed), (1, 2, L, width), dtype)
        for seed, width in enumerate((sizes.qk, sizes.qk, sizes.v))
    )
    operands = q * sizes.qk**-0.5, k, v, selection_bits(L, L // 8, scattered=True)
    found = jax.jit(functools.partial(graded, attend))(*operands)
    shares = {}
    for name, one, right in zip(
        ("out", "lse", "dq", "dk", "dv"), found, graded(attend_reference, *operands), strict=True
    ):
        difference = jnp.max(jnp.abs(one.astype(jnp.float32) - right))
        share = difference / jnp.max(jnp.abs(right.astype(jnp.float32)))
        shares[name] = float(f"{share:.2g}")
    return shares


def copy_rate(size: int) -> float:
    """Measures how many bytes a second a copy of `size` bytes reads and writes."""
    copy, zeros = jax.jit(lambda x: x + 1), jnp.zeros(size // 4, jnp.int32)
    return 2 * size / statistics.median(seconds(lambda _: copy(zeros)))


def rows_of(
    L: int, sizes: Sizes, copy: float, attend: Attend, dtype: Any = jnp.bfloat16
) -> list[dict]:
    """Takes the measurements of one length.

    Args:
      L: tokens.
      sizes: the widths.
      copy: bytes a second that a copy reads and writes.
      attend: the kernel.
      dtype: of all arrays.
    """
    measurements, random = Measurements(L, copy), Random(L, dtype)
    measure_attention(measurements, sizes, attend, random)
    measure_gather(measurements, sizes, random)
    measure_selection(measurements, sizes, random)
    measure_decoding(measurements, sizes, random)
    return measurements.rows


def measure_attention(
    measurements: Measurements, sizes: Sizes, attend: Attend, random: Random
) -> None:
    """Measures the masked kernel, and XLA masked in chunks, forward and backward."""
    L = measurements.length
    q, k, v = (random.normal(1, sizes.heads, L, width) for width in (sizes.qk, sizes.qk, sizes.v))
    bits, tile = jnp.empty(()), Tiles().forward

    def measure(name: str, backward: str, attend: Attend, pairs: int, bits: Array) -> None:
        arrays = 2 * L * sizes.heads * (sizes.qk + sizes.v) * q.dtype.itemsize
        operands = q, k, v, bits
        forward = measurements.add(
            name, 2 * pairs * (sizes.qk + sizes.v), arrays, attend, *operands
        )
        if forward:
            # Five products: what the kernel's two backward passes compute twice counts once.
            flops = 2 * pairs * (3 * sizes.qk + 2 * sizes.v)
            gradients = functools.partial(graded, attend)
            measurements.add(backward, flops, 2 * arrays, gradients, *operands, before=forward)

    for where in ("scattered", "last"):
        bits = selection_bits(L, min(sizes.topk, L), scattered=where == "scattered")
        visited = int(jnp.sum(nonempty_first(along_keys(bits), tile)[1]))
        pairs = sizes.heads * BLOCK * tile * visited
        measure(f"kernel, {where}", f"kernel backward, {where}", attend, pairs, bits)
    if L <= DENSE:
        pairs = sizes.heads * L * L
        measure("masked in chunks", "masked in chunks, backward", attend_reference, pairs, bits)


def measure_gather(measurements: Measurements, sizes: Sizes, random: Random) -> None:
    """Measures absorbed attention of every token over its own gathered latents."""
    L, topk = measurements.length, min(sizes.topk, measurements.length)
    q_TNR, latent_SR = random.normal(L, sizes.heads, sizes.latent), random.normal(L, sizes.latent)
    index_Tk = random.integers((L, topk), jnp.arange(1, L + 1)[:, None])

    def gather(q_TNR, latent_SR, index_Tk):
        def attend(query):
            q_NR, index_k = query
            return gathered(q_NR, latent_SR, index_k, sizes.value)

        return lax.map(attend, (q_TNR, index_Tk), batch_size=sizes.chunk)

    flops, needed = step_work(sizes, topk, q_TNR.dtype)
    measurements.add("gather", L * flops, L * needed, gather, q_TNR, latent_SR, index_Tk)


def measure_selection(measurements: Measurements, sizes: Sizes, random: Random) -> None:
    """Measures the selection of a decoding step, by counting and by a sort."""
    B, L, topk = sizes.batch, measurements.length, min(sizes.topk, measurements.length)
    q_BIC, k_BSC, w_BI = (
        random.normal(B, sizes.index_heads, sizes.index),
        random.normal(B, L, sizes.index),
        random.normal(B, sizes.index_heads),
    )
    operands = q_BIC, k_BSC, w_BI, jnp.ones((B, L), jnp.bool_)
    flops = 2 * B * L * sizes.index_heads * sizes.index
    for name, select in (
        ("select", decode_selection.list_selected_reference),
        ("top_k", sorted_selection),
    ):
        select = functools.partial(select, topk=topk)
        measurements.add(f"{name}, {B} sequences", flops, k_BSC.nbytes, select, *operands)


def measure_decoding(measurements: Measurements, sizes: Sizes, random: Random) -> None:
    """Measures the attention of a decoding step over listed latents."""
    B, L, topk = sizes.batch, measurements.length, min(sizes.topk, measurements.length)
    q_BNR = random.normal(B, sizes.heads, sizes.latent)
    latent_BSR = random.normal(B, L, sizes.latent)
    index_Bk, count_B = random.integers((B, topk), L), jnp.full((B,), topk)
    flops, needed = step_work(sizes, topk, q_BNR.dtype)

    def attend(q_BNR, latent_BSR, index_Bk, count_B):
        return decode_reference(q_BNR, latent_BSR, sizes.value, index_Bk, count_B)

    operands = q_BNR, latent_BSR, index_Bk, count_B
    measurements.add(f"decode, {B} sequences", B * flops, B * needed, attend, *operands)


def step_work(sizes: Sizes, topk: int, dtype: Any) -> tuple[int, int]:
    """Returns the FLOPs of one query over its latents, and their bytes."""
    flops = 2 * sizes.heads * topk * (sizes.latent + sizes.value)
    return flops, topk * sizes.latent * jnp.dtype(dtype).itemsize


def selection_bits(L: int, topk: int, *, scattered: bool) -> Array:
    """Makes the bitmask of one sequence, bits_BTW, a few hundred rows of a mask at a time.

    Each query has `topk` keys or so, from all its past, or the last ones.
    """
    rows = min(L, MASK_ROWS)

    def some_rows(first):
        t, s = first + jnp.arange(rows)[:, None], jnp.arange(L)
        if scattered:
            key = jax.random.fold_in(jax.random.key(0), first)
            wanted = jax.random.uniform(key, (rows, L)) * (t + 1) < topk
        else:
            wanted = s > t - topk
        return pack((s <= t) & wanted)

    return lax.map(some_rows, jnp.arange(0, L, rows)).reshape(1, L, num_words(L))


def gathered(q_NR: Array, latent_SR: Array, index_k: Array, value: int) -> Array:
    """Computes absorbed attention of one query over its own k latents: [N, value]."""
    latent_kR = latent_SR[index_k]
    p_Nk = jax.nn.softmax(
        jnp.einsum("NR,kR->Nk", q_NR, latent_kR, preferred_element_type=jnp.float32), axis=-1
    )
    return jnp.einsum("Nk,kV->NV", p_Nk.astype(q_NR.dtype), latent_kR[:, :value])


def graded(attend: Attend, q: Array, k: Array, v: Array, bits: Array) -> tuple[Array, ...]:
    """Computes out and lse, and the gradients of their sum to q, k and v."""
    values, pull = jax.vjp(lambda q, k, v: attend(q, k, v, bits), q, k, v)
    return *values, *pull(jax.tree.map(jnp.ones_like, values))


def sorted_selection(
    q_BIC: Array, k_BSC: Array, w_BI: Array, allowed_BS: Array, topk: int
) -> Array:
    """Selects what decode_selection does, but in order of score and by XLA's top_k: a sort."""
    scores_B1S = indexer_scores(q_BIC[:, None], k_BSC, w_BI[:, None])
    return lax.top_k(masked_scores(scores_B1S, allowed_BS[:, None])[:, 0], topk)[1]


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags={"heads": Flag(128, "heads on the device")})
