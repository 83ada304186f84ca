"""One matmul for each group of rows, rows in order of their groups: [S, D] x [E, D, F] -> [S, F].

Its gradients are grouped as well: 6 S D F FLOPs in all.

| implementation | what | where |
|---|---|---|
| megablox | the Pallas kernels that come with JAX (arXiv 2211.15841, section 5) | TPU |
| tokamax | `tokamax.ragged_dot`, optional (Python 3.12 or newer) | GPU, and TPU if asked for |

"auto" takes megablox on TPU: where its autotuner has not seen the shapes, tokamax 0.0.17 cuts
operands for v5e, v5p and v6e into 128 x 128, 64 FLOPs to a byte; its second kernels
(`mosaic_tpu_v2`) ask for more vector memory than a v5p or v6e has at DeepSeek-V3.2's widths. On a
GPU neither has been run by this project.

Neither is a bare `jax.lax.ragged_dot`: on CPU and GPU that becomes a dense matmul for every group
over all rows, and so does its gradient to the weights by the TPU compilers of jax 0.10 (libtpu
0.0.42).

S counts rows here, not key positions; E is the groups.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from errors import UserError
from kernels.tiles import padded

GroupedMatmul = Callable[[Array, Array, Array], Array]
PLATFORMS = {"megablox": ("tpu",), "tokamax": ("tpu", "gpu")}
# They are named, since what tokamax chooses by itself may end in a bare ragged_dot. Of a GPU's two
# it takes the first that takes the chip and the shapes.
TOKAMAX_KERNELS = {"tpu": "mosaic_tpu", "gpu": ("mosaic", "triton")}
MIN_TOKAMAX_ROWS = 128  # its kernels take no fewer
WIDTH_BYTES = 2_048  # of a row of a tile at most


class Tiles(NamedTuple):
    """The rows that are multiplied at a time; the other sizes follow from the operands.

    `rows` is a power of two, 128 or more. Groups that begin at multiples of it share no tile, and
    each costs half a tile of padding on average.
    """

    rows: int = 512
    interpret: Any = False


def tile_rows(mean_rows: int) -> int:
    """Returns the rows of a tile, for groups of `mean_rows` rows on average.

    It is as large as it may be with a quarter of all rows padding. 512 rows a tile keep the matrix
    units of a v5e, v5p and TPU7x busy by their data sheets (2 x 512 x 1024 FLOPs to 2 x (512 +
    1024) bytes: 341 FLOPs a byte); a v6e would want 560.
    """
    return max(128, min(512, 1 << max(mean_rows // 2, 1).bit_length() - 1))


def tile_width(size: int, dtype: Any) -> int:
    """Returns how wide a tile is along a dimension of this size.

    It is the multiple of 128 that pads the dimension least, at most 2 KiB of it and at least half
    that. 512 rows by twice 2 KiB take 10 of the 16 MiB of vector memory that a kernel gets on a v5e
    or v5p.
    """
    widest = WIDTH_BYTES // jnp.dtype(dtype).itemsize
    if size <= widest:
        return size
    return min(range(widest, widest // 2 - 1, -128), key=lambda width: -(-size // width) * width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox(x_SD: Array, w_EDF: Array, counts_E: Array, tiles: Tiles = Tiles()) -> Array:
    """Multiplies row s with its group's matrix, in x's dtype, summed in float32.

    Args:
      x_SD: rows, bfloat16 or float32.
      w_EDF: a matrix for each group, of the same dtype.
      counts_E: int32, rows of each group, in order: any, zeros too.
      tiles: rows that are multiplied at a time.

    Rows beyond the sum of counts belong to no group: whatever they hold, NaN too, reaches no other
    row and no gradient to the weights. Nor are they written: their results and gradients hold what
    the memory held. To write zeros there would cost a pass over the whole array, most of which
    belongs to no group where tokens are gathered over the expert axis.
    """
    return _multiply(x_SD, w_EDF, counts_E, tiles, transposed=False)


def _forward(x_SD: Array, w_EDF: Array, counts_E: Array, tiles: Tiles):
    return megablox(x_SD, w_EDF, counts_E, tiles), (x_SD, w_EDF, counts_E)


def _backward(tiles: Tiles, saved: tuple[Array, Array, Array], dy_SF: Array):
    x_SD, w_EDF, counts_E = saved
    dx_SD = _multiply(dy_SF, w_EDF, counts_E, tiles, transposed=True)
    return dx_SD, _weight_gradient(x_SD, dy_SF, counts_E, w_EDF.dtype, tiles), None


megablox.defvjp(_forward, _backward)


def _multiply(
    x_SD: Array, w_EDF: Array, counts_E: Array, tiles: Tiles, *, transposed: bool
) -> Array:
    """Multiplies rows with their groups' matrices, which may be taken transposed."""
    S, D = x_SD.shape
    F = w_EDF.shape[1 if transposed else 2]
    tiling = tiles.rows, tile_width(D, x_SD.dtype), tile_width(F, x_SD.dtype)
    return gmm(
        _whole_tiles(x_SD, tiles),
        w_EDF,
        counts_E,
        x_SD.dtype,
        tiling,
        transpose_rhs=transposed,
        interpret=tiles.interpret,
    )[:S]


def _weight_gradient(x_SD: Array, dy_SF: Array, counts_E: Array, dtype: Any, tiles: Tiles) -> Array:
    """Computes x^T dy of each group, [E, D, F]."""
    widths = (tile_width(x.shape[1], x_SD.dtype) for x in (x_SD, dy_SF))
    return tgmm(
        _whole_tiles(x_SD, tiles).T,  # the kernel transposes it back again
        _whole_tiles(dy_SF, tiles),
        counts_E,
        dtype,
        (tiles.rows, *widths),
        interpret=tiles.interpret,
    )


def _whole_tiles(x_SD: Array, tiles: Tiles) -> Array:
    """Pads the rows to whole tiles."""
    return padded(x_SD, 0, -(-x_SD.shape[0] // tiles.rows) * tiles.rows)


def tokamax(x_SD: Array, w_EDF: Array, counts_E: Array, kernels: str | tuple[str, ...]) -> Array:
    """Multiplies as `megablox` does, by those of tokamax's kernels that are named.

    They bring their own backward pass. On TPU they raise NotImplementedError for widths below 128.
    """
    ragged_dot = importlib.import_module("tokamax").ragged_dot  # optional, so no import above
    S = x_SD.shape[0]
    x_SD = padded(x_SD, 0, max(S, MIN_TOKAMAX_ROWS))
    return ragged_dot(x_SD, w_EDF, counts_E, implementation=kernels)[:S]


def preferred(platform: str) -> str:
    """Returns what "auto" takes on this platform; "" where there is none."""
    if platform == "gpu" and importlib.util.find_spec("tokamax"):
        return "tokamax"
    return "megablox" if platform == "tpu" else ""


def pick(name: str, platform: str, mean_rows: int) -> tuple[GroupedMatmul, int]:
    """Returns a grouped matmul, and the rows on whose multiples groups had best begin.

    Args:
      name: "megablox" or "tokamax".
      platform: what the program is compiled for.
      mean_rows: rows of a group on average.

    Raises UserError where it does not run or is not installed.
    """
    if platform not in PLATFORMS[name]:
        raise UserError(
            f'model.expert_matmul = "{name}": runs on {" and ".join(PLATFORMS[name])}, and this is '
            f'{platform}; "auto" takes what there is'
        )
    if name == "megablox":
        tiles = Tiles(tile_rows(mean_rows))
        return functools.partial(megablox, tiles=tiles), tiles.rows
    if importlib.util.find_spec("tokamax") is None:
        raise UserError(
            'model.expert_matmul = "tokamax": it is not installed; pip install tokamax '
            '(Python 3.12 or newer), or take "auto"'
        )
    return functools.partial(tokamax, kernels=TOKAMAX_KERNELS[platform]), 1
