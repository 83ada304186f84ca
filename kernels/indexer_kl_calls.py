"""The grids, blocks and tables of tiles of the two kernels of the indexer's KL loss.

The grid runs over batch rows b, tiles of queries i, tiles of keys j and groups of heads. Of a tile
without a key nothing is computed, and the next tile with one is fetched in its place.

The queries of all heads stay in VMEM for a row of tiles; the keys come HEADS_AT_ONCE heads at a
time, the innermost dimension of the grid, and the last group does the rest. What a kernel adds to
lies in HBM: a block of dq is fetched and put back once a row of tiles, a tile of dk with every
tile. So tiles run in order, on one core a sequence.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import KEYS, LANES
from kernels.device import ambient_device
from kernels.indexer_kl_kernel import (
    Inputs,
    Outputs,
    Scratch,
    TileTables,
    kl_kernel,
    normaliser_kernel,
)
from kernels.tiles import F32, SUBLANES, vmem_bytes

# Heads of a program whose keys are on the chip: 4 MiB for a tile of 256, fetched while the 32 heads
# before are worked on.
HEADS_AT_ONCE = 32


class Tiles(NamedTuple):
    """The size of a tile: multiples of 128.

    Attributes:
      queries: 0 for `indexer_kl.most_queries`.
      keys: a divisor of 4096.
      interpret: as in `pallas_call`.
    """

    queries: int = 0
    keys: int = 256
    interpret: Any = False


class MainAttention(NamedTuple):
    """The attention that the indexer is compared with.

    Attributes:
      q_BNTH: the queries of all heads.
      k_BNSH: the keys; of a device's own heads alone, if heads lie over a mesh axis.
      lse_BNT: the log-sum-exp over the keys compared.
    """

    q_BNTH: Array
    k_BNSH: Array
    lse_BNT: Array


class Operand(NamedTuple):
    """An array, or the shape of a result, and the block of it that a step of the grid sees."""

    array: Any
    spec: pl.BlockSpec


IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def normaliser(
    tables: TileTables,
    index_q_BITC: Array,
    index_k_BSC: Array,
    index_w_BTI: Array,
    allowed_BTW: Array,
    tiles: Tiles,
) -> Array:
    """Computes the log-sum-exp of the indexer's scores over a chunk's keys in the bitmask.

    Args:
      tables: of the chunk of keys.
      index_q_BITC, index_k_BSC, index_w_BTI: the indexer's.
      allowed_BTW: the keys compared.
      tiles: the size of a tile.

    Returns: [B, 1, T] float32; INITIAL_MAX and less for a query without any key.
    """
    (B, I, T, _), queries = index_q_BITC.shape, tiles.queries
    q, k, allowed = _indexer_operands(index_q_BITC, index_k_BSC, allowed_BTW, tiles=tiles)
    w = Operand(index_w_BTI, _spec((1, queries, I), lambda b, i, j: (b, i, 0)))
    (lse_B1T,) = _call(
        normaliser_kernel,
        "indexer_normaliser",
        tables,
        [q, w, k, allowed],
        [Operand((B, 1, T), _query_row(queries))],
        [pltpu.VMEM((queries, LANES), F32)] * 2,
        tiles,
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    )
    return lse_B1T


def loss_and_gradients(
    tables: TileTables,
    attention: MainAttention,
    index_q_BITC: Array,
    index_k_BSC: Array,
    index_w_BTI: Array,
    index_lse_B1T: Array,
    allowed_BTW: Array,
    selected_BTW: Array,
    dq_BICT: Array,
    dk_BSC: Array,
    tiles: Tiles,
) -> list[Array]:
    """Computes the loss over a chunk of keys, and adds to its gradients.

    Args:
      tables: of the chunk of keys.
      attention: k_BNSH has the chunk's keys alone.
      index_q_BITC, index_k_BSC, index_w_BTI: the indexer's, with all keys.
      index_lse_B1T: the log-sum-exp of its scores over all keys compared.
      allowed_BTW, selected_BTW: see `total_kl_tpu`.
      dq_BICT, dk_BSC: the gradients so far, float32; dq lies as the kernel sums it.
      tiles: the size of a tile.

    Returns: kl_B1T, recall_B1T, dw_BI1T of the chunk's keys, and the new dq_BICT and dk_BSC.
    """
    (B, I, T, C), (queries, keys, _) = index_q_BITC.shape, tiles
    q_BNTH, k_BNSH, lse_BNT = attention
    N, H = q_BNTH.shape[1], q_BNTH.shape[3]
    heads = max(count for count in range(1, min(N, HEADS_AT_ONCE) + 1) if N % count == 0)
    groups = N // heads

    def group_block(b, i, j, group, nonempty_ref, fetch_ref, first_ref):
        """Returns which block of the attention's keys a step fetches.

        At an empty tile it is the first group of the next nonempty one, ahead of time; after the
        last of those, its last group, which is there already.
        """
        tile = fetch_ref[b, i, j]
        group_at_empty = jnp.where(tile > j, 0, groups - 1)
        return b, jnp.where(nonempty_ref[b, i, j] != 0, group, group_at_empty), tile, 0

    query_row = _query_row(queries)
    head_row = _spec((1, I, 1, queries), lambda b, i, j: (b, 0, 0, i))
    index_q, index_k, allowed, selected = _indexer_operands(
        index_q_BITC, index_k_BSC, allowed_BTW, selected_BTW, tiles=tiles
    )
    index_w = Operand(jnp.swapaxes(index_w_BTI, 1, 2)[:, :, None], head_row)
    # Fetched once for a row of tiles, so one buffer is enough.
    row_of_tiles = _spec(
        (1, N, queries, H), lambda b, i, j: (b, 0, i, 0), pipeline_mode=pl.Buffered(1)
    )
    inputs = Inputs(
        q=Operand(q_BNTH, row_of_tiles),
        k=Operand(k_BNSH, pl.BlockSpec((1, heads, keys, H), group_block)),
        lse=Operand(lse_BNT[:, :, None], _spec((1, N, 1, queries), lambda b, i, j: (b, 0, 0, i))),
        index_q=index_q,
        index_w=index_w,
        index_k=index_k,
        index_lse=Operand(index_lse_B1T, query_row),
        allowed=allowed,
        selected=selected,
        dq=Operand(dq_BICT, IN_HBM),
        dk=Operand(dk_BSC, IN_HBM),
    )
    outputs = Outputs(
        kl=Operand((B, 1, T), query_row),
        recall=Operand((B, 1, T), query_row),
        dw=Operand((B, I, 1, T), head_row),
        dq=Operand(dq_BICT.shape, IN_HBM),
        dk=Operand(dk_BSC.shape, IN_HBM),
    )
    scratch = Scratch(
        kl=pltpu.VMEM((SUBLANES, queries), F32),
        recall=pltpu.VMEM((SUBLANES, queries), F32),
        dw=pltpu.VMEM((I, SUBLANES, queries), F32),
        p=pltpu.VMEM((keys, queries), F32),
        relu=pltpu.VMEM((I, keys, queries), index_k_BSC.dtype),
        dq=pltpu.VMEM((I, C, queries), F32),
        dk=pltpu.VMEM((keys, C), F32),
        dq_copied=pltpu.SemaphoreType.DMA,
        dk_copied=pltpu.SemaphoreType.DMA,
    )
    return _call(
        functools.partial(kl_kernel, groups=groups),
        "indexer_kl",
        tables,
        inputs,
        outputs,
        scratch,
        tiles,
        groups=groups,
        # dk and dq are a sequence's own
        semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        aliases={Inputs._fields.index(name): Outputs._fields.index(name) for name in ("dq", "dk")},
    )


def _indexer_operands(
    index_q_BITC: Array, index_k_BSC: Array, *masks: Array, tiles: Tiles
) -> list[Operand]:
    """Returns the operands q, k and the bitmasks."""
    (_, I, _, C), tiles_of_word = index_q_BITC.shape, KEYS // tiles.keys
    bits_block = _spec((1, tiles.queries, LANES), lambda b, i, j: (b, i, lax.div(j, tiles_of_word)))
    return [
        Operand(index_q_BITC, _spec((1, I, tiles.queries, C), lambda b, i, j: (b, 0, i, 0))),
        Operand(index_k_BSC, _spec((1, tiles.keys, C), lambda b, i, j: (b, j, 0))),
        *(Operand(bits_BTW, bits_block) for bits_BTW in masks),
    ]


def _query_row(queries: int) -> pl.BlockSpec:
    """Returns the block of an array [B, 1, T], a number a query."""
    return _spec((1, 1, queries), lambda b, i, j: (b, 0, i))


def _spec(block: tuple[int, ...], index: Callable[..., tuple], **options) -> pl.BlockSpec:
    """Makes a block that follows the tables of tiles.

    Args:
      block: its shape.
      index: (b, i, tile of the sequence) -> which block. In place of an empty tile it is given the
        next nonempty one, which is fetched ahead of time.
      options: of `pl.BlockSpec`.
    """

    def fetched(b, i, j, group, nonempty_ref, fetch_ref, first_ref):
        return index(b, i, first_ref[0] + fetch_ref[b, i, j])

    return pl.BlockSpec(block, fetched, **options)


def _call(
    kernel: Callable[..., None],
    name: str,
    tables: TileTables,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    scratch: Sequence[Any],
    tiles: Tiles,
    *,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    groups: int = 1,
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    """Runs a kernel over the grid of tiles.

    Args:
      kernel: takes the references of tables, inputs, outputs and scratch, in this order.
      name: the kernel's, in profiles.
      tables, inputs, outputs, scratch: outputs have shapes for arrays, and are float32.
      tiles: `interpret` counts.
      semantics: of the grid's dimensions.
      groups: of heads.
      aliases: input -> output, by their places.
    """
    limit = vmem_bytes(ambient_device().device_kind) * 15 // 16  # the rest is the compiler's own
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(*tables.nonempty.shape, groups),
            in_specs=[operand.spec for operand in inputs],
            out_specs=[result.spec for result in outputs],
            scratch_shapes=list(scratch),
        ),
        out_shape=[jax.ShapeDtypeStruct(result.array, F32) for result in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit),
        input_output_aliases={
            len(tables) + place: result for place, result in (aliases or {}).items()
        },
        interpret=tiles.interpret,
        name=name,
    )(*tables, *(operand.array for operand in inputs))
