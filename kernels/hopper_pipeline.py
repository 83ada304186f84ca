"""A pipeline over tiles for kernels on an NVIDIA Hopper GPU: one warpgroup copies, two compute.

A program computes BLOCK rows of its results, ROWS rows in each computing warpgroup. It reads two
kinds of operands: resident ones, of its own rows, which it loads once and keeps; and streamed ones,
of the other side, which arrive tile by tile. Each streamed operand has a ring of slots in shared
memory (pipeline stages, in CUTLASS's words):

    produce: 1 warpgroup              ring                       consume: 2 warpgroups
    wait until the slot is free       [ slot 0 | slot 1 | .. ]   wait until the tile has landed
    start TMA copies into it    --->                       --->  multiply; release the slot

Each slot has two barriers: `landed`, on which the copies arrive, and `free`, on which both
computing warpgroups arrive. Only those tiles are copied in which some row of the block has a key.
At the end `write_back` copies the results out through the shared memory of the operands, which is
free by then.

kernels/sparse_attention_gpu.py has the kernels that run on this pipeline, written in Pallas with
Mosaic GPU; `run_pipeline` is the place to start. Interpreted on a CPU everything is as on the
device except wgmma itself, in whose place `dot_transposed` and `add_dot` compute the same product
plainly (docs/gpu.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.bitmask import BITS
from kernels.hopper_memory import (
    BLOCK,
    GROUPS,
    ROWS,
    Layout,
    Operands,
    Result,
    Ring,
    Scratch,
    StreamedTile,
)
from kernels.tiles import F32, dot

# Registers of a thread: 128 * (2 * 240 + 24) are nearly all of the 65,536 of a multiprocessor.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24

Step = Callable[[list[StreamedTile], Any], Any]
FoldTiles = Callable[[Step, Any], Any]
Compute = Callable[[list[Any], FoldTiles], Sequence[Array]]


class Program(NamedTuple):
    """Holds the rows that one program computes, and how many tiles it visits; traced numbers."""

    b: Array  # sequence
    n: Array  # head
    group: Array  # warpgroup: 0 and 1 compute, 2 copies
    block: Array  # of BLOCK rows
    steps: Array  # tiles in which some row of the block has a key


def run_pipeline(
    compute: Compute,
    name: str,
    operands: Operands,
    results: Sequence[Result],
    *,
    tile: int,
    interpret: Any,
) -> list[Array]:
    """Runs `compute` for each block of rows, over the tiles in which one of them has a key.

    Args:
      compute: called in each computing warpgroup as compute(resident_refs, fold_tiles):
        `resident_refs` are the warpgroup's ROWS rows of the resident operands in shared memory;
        fold_tiles(step, carry) -> carry calls step(tiles, carry) for the block's tiles in order,
        where `tiles` has a StreamedTile for each streamed operand. It returns the warpgroup's rows
        of the results.
      name: the kernel's name in profiles.
      operands: what it reads; the number of rows R is a multiple of BLOCK.
      results: what it computes.
      tile: rows of the other side in a tile, a multiple of 32.
      interpret: an interpreter's parameters, or None.

    Returns: an array for each of `results`. Raises UserError where heads are too wide.
    """
    B, N, R = operands.resident[0].shape[:3]
    order_Bnm, count_Bn = nonempty_first(operands.words_BwR, tile)
    layout = Layout.plan(operands, tile)

    def kernel(order_ref, count_ref, words_ref, *rest):
        """Divides the refs among the operands; two warpgroups compute, the third copies."""
        refs = iter(rest)
        resident_refs = [next(refs) for _ in operands.resident]
        streamed_refs = [next(refs) for _ in operands.streamed]
        streamed_row_refs = [next(refs) for _ in operands.streamed_rows]
        result_refs = [next(refs) for _ in results]
        scratch = Scratch(*refs)
        rings = Ring.all_of(scratch, layout.depth)
        b, n, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
        # Under a causal mask the last blocks have most to do, so they begin first.
        block = R // BLOCK - 1 - lax.axis_index("block")
        program = Program(b, n, group, block, steps=count_ref[b, block])

        @pl.when(group < GROUPS)
        def _consume():
            consume(program, compute, resident_refs, rings, results, result_refs, scratch)

        @pl.when(group == GROUPS)
        def _produce():
            produce(program, rings, order_ref, words_ref, streamed_refs, streamed_row_refs, tile)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=[result.shape(operands) for result in results],
        scratch_types=layout.scratch_types(),
        grid=(B, N, R // BLOCK),
        grid_names=("b", "n", "block"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(
        order_Bnm,
        count_Bn,
        operands.words_BwR,
        *operands.resident,
        *operands.streamed,
        *(x[:, :, None] for x in operands.streamed_rows),
    )


def nonempty_first(words_BwR: Array, tile: int) -> tuple[Array, Array]:
    """Lists the tiles of each block of BLOCK rows, those with a bit first and in order.

    Args:
      words_BwR: see `Operands`.
      tile: rows of the other side in a tile.

    Returns: order [B, R / BLOCK, tiles], and how many tiles have a bit, [B, R / BLOCK]; int32.
    """
    B, w, R = words_BwR.shape
    nonempty_Bmn = jnp.any(
        words_BwR.reshape(B, w * BITS // tile, tile // BITS, R // BLOCK, BLOCK) != 0, axis=(2, 4)
    )
    nonempty_Bnm = jnp.swapaxes(nonempty_Bmn, 1, 2)
    order_Bnm = jnp.argsort(~nonempty_Bnm, axis=-1, stable=True).astype(jnp.int32)
    return order_Bnm, jnp.sum(nonempty_Bnm, axis=-1, dtype=jnp.int32)


def produce(
    program: Program,
    rings: list[Ring],
    order_ref: Any,
    words_ref: Any,
    streamed_refs: list,
    streamed_row_refs: list,
    tile: int,
) -> None:
    """Copies the block's tiles into the rings, in order; the whole work of the third warpgroup.

    Args:
      program: which block.
      rings: where the tiles go.
      order_ref: int32 [B, blocks, tiles], see `nonempty_first`.
      words_ref, streamed_refs, streamed_row_refs: the operands in global memory; a streamed row is
        [B, N, 1, rows].
      tile: rows of a tile.
    """
    b, n, _, block, steps = program
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _copy(step):
        index = order_ref[b, block, step]
        rows = pl.ds(index * tile, tile)
        words = pl.ds(index * (tile // BITS), tile // BITS)
        sources = [[ref.at[b, n, rows]] for ref in streamed_refs]
        sources[0] += [ref.at[b, n, pl.ds(0, 1), rows] for ref in streamed_row_refs]
        sources[0] += [words_ref.at[b, words, pl.ds(block * BLOCK, BLOCK)]]
        for ring, own in zip(rings, sources, strict=True):
            ring.copy_in(step, own)

    # This warpgroup may end only when the last tiles too have been read.
    depth = rings[0].depth

    @pl.loop(jnp.maximum(steps, depth), steps + depth)
    def _drain(step):
        for ring in rings:
            ring.wait_until_free(step)


def consume(
    program: Program,
    compute: Compute,
    resident_refs: list,
    rings: list[Ring],
    results: Sequence[Result],
    result_refs: list,
    scratch: Scratch,
) -> None:
    """Computes ROWS rows of the results; the whole work of one of the first two warpgroups.

    Args:
      program: which block, and which half of it.
      compute: see `run_pipeline`.
      resident_refs, result_refs: in global memory.
      rings: where the tiles arrive.
      results: how the results leave.
      scratch: shared memory and barriers.
    """
    b, n, group, block, steps = program
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    rows = pl.ds(block * BLOCK + group * ROWS, ROWS)
    resident = [buffer.at[group] for buffer in scratch.resident]
    for source, buffer in zip(resident_refs, resident, strict=True):
        plgpu.copy_gmem_to_smem(source.at[b, n, rows], buffer, scratch.resident_landed.at[group])
    plgpu.barrier_wait(scratch.resident_landed.at[group])

    def fold_tiles(step: Step, carry: Any) -> Any:
        def one(index, carry):
            return step([ring.tile(index, group) for ring in rings], carry)

        return lax.fori_loop(0, steps, one, carry)

    values = compute(resident, fold_tiles)
    plgpu.barrier_arrive(scratch.computed)
    plgpu.barrier_wait(scratch.computed)  # now both have read their last tile
    destinations = [ref.at[b, n, rows] for ref in result_refs]
    write_back(values, results, destinations, resident, rings, scratch.row_result.at[group], group)


def write_back(
    values: Sequence[Array],
    results: Sequence[Result],
    destinations: list,
    resident: list,
    rings: list[Ring],
    row_result: Any,
    group: Array,
) -> None:
    """Copies a warpgroup's rows of the results to global memory, through shared memory.

    Args:
      values: the rows in registers, [ROWS, width] or [ROWS].
      results: through which operand's shared memory each leaves.
      destinations: their places in global memory.
      resident: the warpgroup's resident operands.
      rings: a warpgroup takes the ring's slot of its own number.
      row_result: the place for a number for each row.
      group: the warpgroup.
    """
    for result, value, destination in zip(results, values, destinations, strict=True):
        if result.resident is not None:
            buffer = resident[result.resident]
        elif result.streamed is not None:
            buffer = rings[result.streamed].matrix.at[group, pl.ds(0, ROWS)]
        else:
            buffer = row_result
        buffer[...] = value.astype(destination.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, destination)
    plgpu.wait_smem_to_gmem(0)


def dot_transposed(a_ref: Any, b_ref: Any, interpret: Any) -> Array:
    """Multiplies a b^T, two tiles in shared memory [rows, width] and [columns, width]; float32."""
    if interpret:
        return dot(_read(a_ref), _read(b_ref), (1, 1))

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a_ref, b_ref.transpose((1, 0)))
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a_ref.shape[0], b_ref.shape[0]), F32))


def add_dot(total: Array, a: Array, b_ref: Any, interpret: Any) -> Array:
    """Returns total + a b: total and a in registers, b in shared memory."""
    if interpret:
        return total + dot(a, _read(b_ref), (1, 0))
    multiply = pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b_ref))
    return cast(Array, multiply(plgpu.WGMMAAccumulatorRef.init(total)))


def _read(ref: Any) -> Array:
    """Interpreted, reads what wgmma would read: which needs no fence there, but does here."""
    x = ref[...]
    plgpu.commit_smem()
    return x
