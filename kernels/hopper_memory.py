"""The shared memory of a program on an NVIDIA Hopper GPU (Mosaic GPU).

It holds resident rows, rings of tiles, and barriers that say when a copy has landed and when a slot
is free again. kernels/hopper_pipeline.py draws how a program uses them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from errors import UserError
from kernels.bitmask import BITS
from kernels.tiles import F32

ROWS = 64  # rows of a computing warpgroup: those of one wgmma
GROUPS = 2  # computing warpgroups
BLOCK = GROUPS * ROWS
SHARED_BYTES = 227 * 1024  # shared memory that a program may have on Hopper
RESERVED_BYTES = 3072  # the part of it for barriers, for reductions across warps, and for alignment
MAX_DEPTH = 4  # slots of a ring at most
SWIZZLE_BYTES = 128  # wgmma reads matrices from shared memory swizzled over so many bytes


class Operands(NamedTuple):
    """The arrays that a kernel reads; B sequences and N heads come first in each.

    Attributes:
      resident: [B, N, R, width] or [B, N, R], R rows on the block's side.
      streamed: [B, N, rows, width] on the other side; each has a ring of its own.
      streamed_rows: [B, N, rows], one number for each row of the other side; they arrive with the
        first streamed operand.
      words_BwR: int32 bitmask of which pairs of rows attend to each other: 32 rows of the other
        side in a word, the R rows of the block's side last. It arrives with the first streamed
        operand too.
    """

    resident: list[Array]
    streamed: list[Array]
    streamed_rows: list[Array]
    words_BwR: Array


class Result(NamedTuple):
    """One result of the block's rows, and the shared memory through which it leaves.

    It has the width and dtype of the resident or streamed operand of this index, and leaves through
    that operand's memory. With neither it is a float32 number for each row.
    """

    resident: int | None = None
    streamed: int | None = None

    def shape(self, operands: Operands) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of the whole result."""
        rows = operands.resident[0].shape[:3]
        if self.resident is not None:
            like = operands.resident[self.resident]
        elif self.streamed is not None:
            like = operands.streamed[self.streamed]
        else:
            return jax.ShapeDtypeStruct(rows, F32)
        return jax.ShapeDtypeStruct((*rows, like.shape[3]), like.dtype)


class Buffer(NamedTuple):
    """An array in shared memory."""

    shape: tuple[int, ...]
    dtype: Any
    matrix: bool = False  # an operand of wgmma, so tiled and swizzled

    @classmethod
    def of_rows(cls, rows: tuple[int, ...], x: Array) -> "Buffer":
        """Returns a buffer for so many rows of an array [B, N, rows, width] or [B, N, rows]."""
        return cls((*rows, *x.shape[3:]), x.dtype, matrix=x.ndim == 4)

    @property
    def bytes(self) -> int:
        """The size of the buffer."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def allocate(self, *slots: int) -> Any:
        """Returns the scratch type of the buffer, `slots` times."""
        columns = SWIZZLE_BYTES // jnp.dtype(self.dtype).itemsize
        transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)
        return plgpu.SMEM(
            (*slots, *self.shape), self.dtype, transforms=transforms if self.matrix else ()
        )


class Scratch(NamedTuple):
    """The shared memory and the barriers of a program, in the order of their allocation."""

    resident: list  # for each resident operand [GROUPS, ROWS, ...]
    rings: list[list]  # for each ring its buffers [depth, tile, ...]
    row_result: Any  # [GROUPS, ROWS] float32, through which a number for each row leaves
    resident_landed: Any  # a barrier for each computing warpgroup
    landed: list  # for each ring a barrier for each slot
    free: list  # likewise
    computed: Any  # one barrier: both computing warpgroups are behind their last tile


class Layout(NamedTuple):
    """Divides the shared memory of a program into buffers."""

    resident: list[Buffer]
    slots: list[list[Buffer]]  # the buffers of one slot of each ring
    depth: int  # slots of a ring

    @classmethod
    def plan(cls, operands: Operands, tile: int) -> "Layout":
        """Fits as many slots into shared memory as there is room for, up to MAX_DEPTH.

        Raises UserError where there is no room for two: one is read while another arrives.
        """
        resident = [Buffer.of_rows((GROUPS, ROWS), x) for x in operands.resident]
        slots = [[Buffer.of_rows((tile,), x)] for x in operands.streamed]
        slots[0] += [Buffer.of_rows((1, tile), x) for x in operands.streamed_rows]
        slots[0] += [Buffer((tile // BITS, BLOCK), jnp.int32)]
        room = SHARED_BYTES - RESERVED_BYTES - sum(buffer.bytes for buffer in resident)
        depth = room // sum(buffer.bytes for slot in slots for buffer in slot)
        if depth < GROUPS:  # `write_back` needs a slot for each warpgroup
            arrays = (*operands.resident, *operands.streamed)
            widths = sorted({x.shape[3] for x in arrays if x.ndim == 4})
            raise UserError(
                f"model.attention_form = 'tiles': heads as wide as {widths} leave no room for two "
                "tiles in a GPU's shared memory; take 'chunks'"
            )
        return cls(resident, slots, min(depth, MAX_DEPTH))

    def scratch_types(self) -> Scratch:
        """Returns what Mosaic allocates for a program."""
        return Scratch(
            resident=[buffer.allocate() for buffer in self.resident],
            rings=[[buffer.allocate(self.depth) for buffer in slot] for slot in self.slots],
            row_result=plgpu.SMEM((GROUPS, ROWS), F32),
            resident_landed=plgpu.Barrier(num_arrivals=len(self.resident), num_barriers=GROUPS),
            landed=[
                plgpu.Barrier(num_arrivals=len(s), num_barriers=self.depth) for s in self.slots
            ],
            free=[plgpu.Barrier(num_arrivals=GROUPS, num_barriers=self.depth) for _ in self.slots],
            computed=plgpu.Barrier(num_arrivals=GROUPS),
        )


class StreamedTile(NamedTuple):
    """A tile of one streamed operand in its slot, as a computing warpgroup sees it."""

    matrix: Any  # [tile, width]
    rows: list  # [1, tile] for each of `Operands.streamed_rows`, in the first ring alone
    words: Any  # [tile / 32, ROWS], the bitmask of the warpgroup's rows, in the first ring alone
    landed: Any
    free: Any

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix."""
        return self.matrix.dtype

    def wait(self) -> Any:
        """Waits until the tile has landed; returns the matrix, for wgmma to read."""
        plgpu.barrier_wait(self.landed)
        return self.matrix

    def row(self, index: int) -> Array:
        """Reads one of the streamed rows, [tile], into registers."""
        return self.rows[index][0]

    def bitmask(self) -> list[Array]:
        """Reads the bitmask into registers: a word [ROWS] for each 32 columns of the tile."""
        return [self.words[index] for index in range(self.words.shape[0])]

    def release(self, *, after_register_reads: bool = False) -> None:
        """Frees the slot for another tile.

        Args:
          after_register_reads: whether something in the slot is read into registers. What TMA
            writes next is ordered behind such a read only by a fence.
        """
        if after_register_reads:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free)


class Ring(NamedTuple):
    """The slots of one streamed operand in shared memory, and their barriers.

    The first ring also carries the streamed rows and the words of the bitmask.
    """

    matrix: Any  # [depth, tile, width]
    rows: list  # [depth, 1, tile] each
    words: Any  # [depth, tile / 32, BLOCK], or None
    landed: Any  # a barrier for each slot
    free: Any  # likewise
    depth: int

    @staticmethod
    def all_of(scratch: Scratch, depth: int) -> list["Ring"]:
        """Returns the ring of each streamed operand."""
        (matrix, *rows, words), *others = scratch.rings
        buffers = [(matrix, rows, words), *((matrix, [], None) for (matrix,) in others)]
        barriers = zip(scratch.landed, scratch.free, strict=True)
        return [
            Ring(matrix, rows, words, landed, free, depth)
            for (matrix, rows, words), (landed, free) in zip(buffers, barriers, strict=True)
        ]

    def slot(self, step: Array) -> Array:
        """Returns the slot of the tile of this step."""
        return lax.rem(step, jnp.int32(self.depth))

    def tile(self, step: Array, group: Array) -> StreamedTile:
        """Returns the tile of this step for a computing warpgroup, landed or not."""
        return StreamedTile(
            matrix=self.matrix.at[self.slot(step)],
            rows=[row.at[self.slot(step)] for row in self.rows],
            words=None
            if self.words is None
            else self.words.at[self.slot(step)].at[:, pl.ds(group * ROWS, ROWS)],
            landed=self.landed.at[self.slot(step)],
            free=self.free.at[self.slot(step)],
        )

    def copy_in(self, step: Array, sources: Sequence[Any]) -> None:
        """Starts the copies of a tile (matrix, rows, words) as soon as its slot is free."""

        @pl.when(step >= self.depth)
        def _wait_until_free():
            self.wait_until_free(step)

        buffers = [self.matrix, *self.rows, *([] if self.words is None else [self.words])]
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                source, buffer.at[self.slot(step)], self.landed.at[self.slot(step)]
            )

    def wait_until_free(self, step: Array) -> None:
        """Waits until both computing warpgroups have released the slot of this step."""
        plgpu.barrier_wait(self.free.at[self.slot(step)])
