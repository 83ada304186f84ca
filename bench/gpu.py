"""Sparse attention on a GPU, every way there is here, at DeepSeek-V3.2's widths: what the table of implementations shall be decided by.

    python -m bench.gpu                    128 heads: one device has them all
    python -m bench.gpu --heads=16         as with eight devices that share them

Of each length: the masked kernel forward and backward, on keys scattered over the whole past (no tile is empty) and on the last ones alone (most are); plain
XLA masked, in chunks of queries; XLA's gather of chosen latents and two batched products, for reading (`gather`) and for one step of writing (`decode`).
TFLOP/s counts what is computed: of the kernel the pairs in tiles it visits. GB/s counts what must be read once, and its share is of what a copy in memory
reaches. One JSON line, medians of 10; nothing is written. Needs a Hopper GPU.
"""

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from errors import UserError
from launch.command import Flag, command
from model.kernels.keyset import along_keys, pack, words
from model.kernels.sparse_attention import attend_reference
from model.kernels.sparse_attention_gpu import BLOCK, Tiles, attend_gpu, held_first

LENGTHS = (4_096, 8_192, 32_768, 65_536)
REPEATS = 10


class Sizes(NamedTuple):
    """Of DeepSeek-V3.2 (arXiv 2512.02556): widths of expanded heads, of latents with and without the rotated part, and chosen keys; of a step, sequences."""

    heads: int
    qk: int = 192
    v: int = 128
    latent: int = 576
    value: int = 512
    topk: int = 2_048
    batch: int = 64
    chunk: int = 128  # queries whose latents are gathered at a time


def seconds(function: Callable, *arguments) -> float:
    """Median of REPEATS calls, after two that compile and warm up."""
    times = []
    for repeat in range(-2, REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        if repeat >= 0:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def chosen(L: int, topk: int, *, scattered: bool) -> Array:
    """bits_BTW of one sequence: topk keys or so of each query, from all its past or the last ones. Never more than a few hundred rows of a mask."""
    rows = min(L, 256)

    def some(first):
        t, s = first + jnp.arange(rows)[:, None], jnp.arange(L)
        near = jax.random.uniform(jax.random.fold_in(jax.random.key(0), first), (rows, L)) * (t + 1) < topk if scattered else s > t - topk
        return pack((s <= t) & near)

    return lax.map(some, jnp.arange(0, L, rows)).reshape(1, L, words(L))


def gathered(q_NR: Array, latent_SR: Array, index_k: Array, value: int) -> Array:
    """Absorbed attention of one query over its own latents: [N, value]."""
    latent_kR = latent_SR[index_k]
    p_Nk = jax.nn.softmax(jnp.einsum("NR,kR->Nk", q_NR, latent_kR, preferred_element_type=jnp.float32), axis=-1)
    return jnp.einsum("Nk,kV->NV", p_Nk.astype(q_NR.dtype), latent_kR[:, :value])


def rows_of(L: int, sizes: Sizes, copy: float, attend: Callable, dtype=jnp.bfloat16) -> list[dict]:
    """The measurements of one length. `copy`: bytes a second that a copy reads and writes; `attend` as attend_gpu."""
    keys = iter(jax.random.split(jax.random.key(L), 9))
    found = []

    def drawn(*shape: int) -> Array:
        return (jax.random.normal(next(keys), shape) * shape[-1] ** -0.25).astype(dtype)

    def measured(name: str, flops: float, needed: float, function: Callable, *arguments, before: float = 0.0) -> float:
        """Adds a row, of the time beyond `before`. What does not fit into memory is said in its row."""
        try:
            took = seconds(jax.jit(function), *arguments) - before
        except jax.errors.JaxRuntimeError as error:
            found.append({"length": L, "what": name, "failed": str(error).splitlines()[0][:200]})
            return 0.0
        speed = {"tflops": round(flops / took / 1e12, 1), "gb_s": round(needed / took / 1e9, 1), "of_copy": round(needed / took / copy, 3)}
        found.append({"length": L, "what": name, "ms": round(took * 1e3, 3)} | speed)
        return took

    q, k, v = (drawn(1, sizes.heads, L, width) for width in (sizes.qk, sizes.qk, sizes.v))
    arrays = 2 * L * sizes.heads * (sizes.qk + sizes.v) * q.dtype.itemsize
    topk = min(sizes.topk, L)

    def both(q, k, v, bits, *, attend):
        return jax.grad(lambda *qkv: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(*qkv, bits)), (0, 1, 2))(q, k, v)

    for scattered in (True, False):
        where = "scattered" if scattered else "last"
        bits = chosen(L, topk, scattered=scattered)
        pairs = sizes.heads * BLOCK * Tiles().forward * int(jnp.sum(held_first(along_keys(bits), Tiles().forward)[1]))
        forward = measured(f"kernel, {where}", 2 * pairs * (sizes.qk + sizes.v), arrays, attend, q, k, v, bits)
        if forward:  # five products: what the two kernels make twice counts once
            again = 2 * pairs * (3 * sizes.qk + 2 * sizes.v)
            measured(f"kernel backward, {where}", again, 2 * arrays, lambda *x: both(*x, attend=attend), q, k, v, bits, before=forward)
    everything = 2 * sizes.heads * L * L * (sizes.qk + sizes.v)
    forward = measured("masked in chunks", everything, arrays, attend_reference, q, k, v, bits)
    if forward:
        again = 2 * sizes.heads * L * L * (3 * sizes.qk + 2 * sizes.v)
        measured("masked in chunks, backward", again, 2 * arrays, lambda *x: both(*x, attend=attend_reference), q, k, v, bits, before=forward)
    del q, k, v, bits

    q_TNR, latent_SR = drawn(L, sizes.heads, sizes.latent), drawn(L, sizes.latent)
    index_Tk = jax.random.randint(next(keys), (L, topk), 0, jnp.arange(1, L + 1)[:, None])

    def gather(q_TNR, latent_SR, index_Tk):
        return lax.map(lambda piece: gathered(piece[0], latent_SR, piece[1], sizes.value), (q_TNR, index_Tk), batch_size=sizes.chunk)

    per_query = 2 * sizes.heads * topk * (sizes.latent + sizes.value)
    measured("gather", L * per_query, L * topk * sizes.latent * q_TNR.dtype.itemsize, gather, q_TNR, latent_SR, index_Tk)
    del q_TNR, latent_SR, index_Tk

    q_BNR, latent_BSR = drawn(sizes.batch, sizes.heads, sizes.latent), drawn(sizes.batch, L, sizes.latent)
    index_Bk = jax.random.randint(next(keys), (sizes.batch, topk), 0, L)
    step = jax.vmap(lambda q, latent, index: gathered(q, latent, index, sizes.value))
    needed = sizes.batch * topk * sizes.latent * q_BNR.dtype.itemsize
    measured(f"decode, {sizes.batch} sequences", sizes.batch * per_query, needed, step, q_BNR, latent_BSR, index_Bk)
    return found


def copy_rate(size: int) -> float:
    """Bytes read and written a second."""
    return 2 * size / seconds(jax.jit(lambda x: x + 1), jnp.zeros(size // 4, jnp.int32))


def run(heads: int) -> None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"bench.gpu needs a GPU; JAX has {device.device_kind} here. On one: pip install 'jax[cuda13]'")
    if device.compute_capability != "9.0":
        raise UserError(f"bench.gpu: {device.device_kind} has compute capability {device.compute_capability}; the kernel is for Hopper, 9.0")
    copy = copy_rate(2**30)
    rows = [row for L in LENGTHS for row in rows_of(L, Sizes(heads), copy, attend_gpu)]
    about = {"device": device.device_kind, "jax": version("jax"), "heads": heads, "copy_gb_s": round(copy / 1e9, 1)}
    print(json.dumps({"bench": "gpu"} | about | {"rows": rows}))


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags={"heads": Flag(128, "heads on the device")})
