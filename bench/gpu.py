"""Sparse attention on a GPU, every way there is here, at DeepSeek-V3.2's widths: what the table of
implementations shall be decided by.

    python -m bench.gpu                    128 heads: one device has them all
    python -m bench.gpu --heads=16         as with eight devices that share them

Of each length: the masked kernel forward and backward, on keys scattered over the whole past (no
tile is empty) and on the last ones alone (most are); plain XLA masked, in chunks of queries, up to
DENSE tokens; XLA's gather of chosen latents and two batched products, for reading (`gather`). One
step of writing is
in two parts: the choice of the latents from the indexer's keys, by the search for its bound and a
list (`select`) or by a sort (`top_k`), and attention over a list at random (`decode`). TFLOP/s
counts what is computed: of the kernel the pairs in tiles it visits. GB/s counts what must be read
once, and its share is of what a copy in memory reaches. First the kernel's values and gradients are
compared with the reference's (`differs`: 0.02 is bfloat16's). One JSON line, medians of 10, of
fewer beyond 32K; nothing is written. Needs a Hopper GPU.
"""

import functools
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bench.workload import REPEATS, seconds
from errors import UserError
from experiment.command_line import Flag, command
from kernels import decode_selection
from kernels.bitmask import along_keys, pack, words
from kernels.hopper_memory import BLOCK
from kernels.hopper_pipeline import nonempty_first
from kernels.reference import indexer_scores, masked_scores
from kernels.sparse_attention import attend_reference
from kernels.sparse_attention_gpu import Tiles, attend_gpu
from kernels.sparse_decode import decode_reference

LENGTHS = (4_096, 8_192, 32_768, 65_536, 131_072)
DENSE = 65_536  # tokens: of 128K every pair is 1.4 PFLOP forward alone


class Sizes(NamedTuple):
    """Of DeepSeek-V3.2 (arXiv 2512.02556): widths of expanded heads, of latents with and without
    the rotated part, the indexer's heads and their width, and chosen keys; of a step, sequences.
    """

    heads: int
    qk: int = 192
    v: int = 128
    latent: int = 576
    value: int = 512
    index_heads: int = 64
    index: int = 128
    topk: int = 2_048
    batch: int = 64
    chunk: int = 128  # queries whose latents are gathered at a time


def chosen(L: int, topk: int, *, scattered: bool) -> Array:
    """bits_BTW of one sequence: topk keys or so of each query, from all its past or the last ones.
    Never more than a few hundred rows of a mask.
    """
    rows = min(L, 256)

    def some(first):
        t, s = first + jnp.arange(rows)[:, None], jnp.arange(L)
        near = (
            jax.random.uniform(jax.random.fold_in(jax.random.key(0), first), (rows, L)) * (t + 1)
            < topk
            if scattered
            else s > t - topk
        )
        return pack((s <= t) & near)

    return lax.map(some, jnp.arange(0, L, rows)).reshape(1, L, words(L))


def gathered(q_NR: Array, latent_SR: Array, index_k: Array, value: int) -> Array:
    """Absorbed attention of one query over its own latents: [N, value]."""
    latent_kR = latent_SR[index_k]
    p_Nk = jax.nn.softmax(
        jnp.einsum("NR,kR->Nk", q_NR, latent_kR, preferred_element_type=jnp.float32), axis=-1
    )
    return jnp.einsum("Nk,kV->NV", p_Nk.astype(q_NR.dtype), latent_kR[:, :value])


def graded(attend: Callable, q: Array, k: Array, v: Array, bits: Array) -> tuple[Array, ...]:
    """Both values, and the gradients of their sum."""
    values, pull = jax.vjp(lambda *qkv: attend(*qkv, bits), q, k, v)
    return *values, *pull(jax.tree.map(jnp.ones_like, values))


def differences(
    attend: Callable, sizes: Sizes, L: int = 1_024, dtype=jnp.bfloat16
) -> dict[str, float]:
    """The largest from the reference, as a share of what is largest there: what is wrong need not
    be fast.
    """
    q, k, v = (
        jax.random.normal(jax.random.key(at), (1, 2, L, width), dtype)
        for at, width in enumerate((sizes.qk, sizes.qk, sizes.v))
    )
    operands = q * sizes.qk**-0.5, k, v, chosen(L, L // 8, scattered=True)
    pairs = zip(
        jax.jit(functools.partial(graded, attend))(*operands),
        graded(attend_reference, *operands),
        strict=True,
    )
    shares = [
        jnp.max(jnp.abs(found.astype(jnp.float32) - right))
        / jnp.max(jnp.abs(right.astype(jnp.float32)))
        for found, right in pairs
    ]
    return {
        name: float(f"{share:.2g}")
        for name, share in zip(("out", "lse", "dq", "dk", "dv"), shares, strict=True)
    }


def rows_of(L: int, sizes: Sizes, copy: float, attend: Callable, dtype=jnp.bfloat16) -> list[dict]:
    """The measurements of one length. `copy`: bytes a second that a copy reads and writes; `attend`
    as attend_gpu.
    """
    keys = iter(jax.random.split(jax.random.key(L), 12))
    repeats = max(2, REPEATS * 32_768 // max(L, 32_768))
    found = []

    def drawn(*shape: int) -> Array:
        return jax.jit(
            lambda key: (jax.random.normal(key, shape) * shape[-1] ** -0.25).astype(dtype)
        )(next(keys))  # at once: in float32 it may not fit

    def measured(
        name: str,
        flops: float,
        needed: float,
        function: Callable,
        *arguments,
        before: float = 0.0,
        **named,
    ) -> float:
        """Adds a row, of the time beyond `before`. What does not fit into memory is said in its
        row.
        """
        try:
            compiled = jax.jit(function)
            took = (
                statistics.median(seconds(lambda _: compiled(*arguments, **named), repeats))
                - before
            )
        except jax.errors.JaxRuntimeError as error:
            found.append({"length": L, "what": name, "failed": str(error).splitlines()[0][:200]})
            return 0.0
        speed = {
            "tflops": round(flops / took / 1e12, 1),
            "gb_s": round(needed / took / 1e9, 1),
            "of_copy": round(needed / took / copy, 3),
        }
        found.append({"length": L, "what": name, "ms": round(took * 1e3, 3)} | speed)
        return took

    q, k, v = (drawn(1, sizes.heads, L, width) for width in (sizes.qk, sizes.qk, sizes.v))
    arrays = 2 * L * sizes.heads * (sizes.qk + sizes.v) * q.dtype.itemsize
    topk = min(sizes.topk, L)

    for scattered in (True, False):
        where = "scattered" if scattered else "last"
        bits = chosen(L, topk, scattered=scattered)
        pairs = (
            sizes.heads
            * BLOCK
            * Tiles().forward
            * int(jnp.sum(nonempty_first(along_keys(bits), Tiles().forward)[1]))
        )
        forward = measured(
            f"kernel, {where}", 2 * pairs * (sizes.qk + sizes.v), arrays, attend, q, k, v, bits
        )
        if forward:  # five products: what the two kernels make twice counts once
            again = 2 * pairs * (3 * sizes.qk + 2 * sizes.v)
            measured(
                f"kernel backward, {where}",
                again,
                2 * arrays,
                functools.partial(graded, attend),
                q,
                k,
                v,
                bits,
                before=forward,
            )
    if L <= DENSE:
        pairs = sizes.heads * L * L
        forward = measured(
            "masked in chunks",
            2 * pairs * (sizes.qk + sizes.v),
            arrays,
            attend_reference,
            q,
            k,
            v,
            bits,
        )
        if forward:
            again = 2 * pairs * (3 * sizes.qk + 2 * sizes.v)
            measured(
                "masked in chunks, backward",
                again,
                2 * arrays,
                functools.partial(graded, attend_reference),
                q,
                k,
                v,
                bits,
                before=forward,
            )
    del q, k, v, bits

    q_TNR, latent_SR = drawn(L, sizes.heads, sizes.latent), drawn(L, sizes.latent)
    index_Tk = jax.random.randint(next(keys), (L, topk), 0, jnp.arange(1, L + 1)[:, None])

    def gather(q_TNR, latent_SR, index_Tk):
        return lax.map(
            lambda piece: gathered(piece[0], latent_SR, piece[1], sizes.value),
            (q_TNR, index_Tk),
            batch_size=sizes.chunk,
        )

    per_query = 2 * sizes.heads * topk * (sizes.latent + sizes.value)
    measured(
        "gather",
        L * per_query,
        L * topk * sizes.latent * q_TNR.dtype.itemsize,
        gather,
        q_TNR,
        latent_SR,
        index_Tk,
    )
    del q_TNR, latent_SR, index_Tk

    B, step = sizes.batch, f"{sizes.batch} sequences"
    q_BIC, k_BSC, w_BI = (
        drawn(B, sizes.index_heads, sizes.index),
        drawn(B, L, sizes.index),
        drawn(B, sizes.index_heads),
    )
    allowed_BS = jnp.ones((B, L), jnp.bool_)
    scoring = 2 * B * L * sizes.index_heads * sizes.index, k_BSC.nbytes
    for name, select in (
        ("select", decode_selection.select_reference),
        ("top_k", sorted_selection),
    ):
        measured(
            f"{name}, {step}",
            *scoring,
            functools.partial(select, topk=topk),
            q_BIC,
            k_BSC,
            w_BI,
            allowed_BS,
        )
    del q_BIC, k_BSC, w_BI, allowed_BS

    q_BNR, latent_BSR = drawn(B, sizes.heads, sizes.latent), drawn(B, L, sizes.latent)
    index_Bk = jax.random.randint(next(keys), (B, topk), 0, L)
    needed = B * topk * sizes.latent * q_BNR.dtype.itemsize
    attend_step = functools.partial(decode_reference, value_rank=sizes.value)
    measured(
        f"decode, {step}",
        B * per_query,
        needed,
        attend_step,
        q_BNR,
        latent_BSR,
        index_Bk=index_Bk,
        count_B=jnp.full((B,), topk),
    )
    return found


def sorted_selection(
    q_BIC: Array, k_BSC: Array, w_BI: Array, allowed_BS: Array, topk: int
) -> Array:
    """What decode_selection's gives, but in order of score and by XLA's top_k: a sort."""
    scores_B1S = indexer_scores(q_BIC[:, None], k_BSC, w_BI[:, None])
    return lax.top_k(masked_scores(scores_B1S, allowed_BS[:, None])[:, 0], topk)[1]


def copy_rate(size: int) -> float:
    """Bytes read and written a second."""
    copy, zeros = jax.jit(lambda x: x + 1), jnp.zeros(size // 4, jnp.int32)
    return 2 * size / statistics.median(seconds(lambda _: copy(zeros)))


def run(heads: int) -> None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(
            f"bench.gpu needs a GPU; JAX has {device.device_kind} here. On one: pip install 'jax[cuda13]'"
        )
    if device.compute_capability != "9.0":
        raise UserError(
            f"bench.gpu: {device.device_kind} has compute capability {device.compute_capability}; the kernel is for Hopper, 9.0"
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


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags={"heads": Flag(128, "heads on the device")})
