"""One matmul per group of rows, rows lying in order of their groups: [S, D] x [E, D, F] -> [S, F].
Its gradients are grouped as well: 6 S D F FLOPs in all.

| implementation | what | where |
|---|---|---|
| megablox | the Pallas kernels that come with JAX, `jax.experimental.pallas.ops.tpu.megablox` (arXiv 2211.15841, section 5) | TPU |
| tokamax | `tokamax.ragged_dot`, an optional dependency (Python 3.12 or newer) | GPU, and TPU if asked for |

"auto" takes megablox on TPU: where its autotuner has not seen the shapes, tokamax 0.0.17 cuts
operands for v5e, v5p and v6e into 128 x 128, 64 FLOPs to a byte; its second kernels
(`mosaic_tpu_v2`) ask for more vector memory than a v5p or v6e has at DeepSeek-V3.2's widths. On a
GPU nobody has run it from here.

Never a bare `jax.lax.ragged_dot`: on CPU and GPU it becomes a dense matmul for every group over all
rows, and so does its gradient to the weights by the TPU compilers of jax 0.10 (libtpu 0.0.42).
"""

import functools
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
# By name, since what tokamax picks by itself may end in a bare ragged_dot. Of a GPU's two the first
# that takes the chip and the shapes.
TOKAMAX_KERNELS = {"tpu": "mosaic_tpu", "gpu": ("mosaic", "triton")}


class Tiles(NamedTuple):
    """What is multiplied at a time; the other sizes follow from the operands."""

    # a power of two, 128 or more. Groups that begin at multiples of it share no tile, and each
    # costs half a tile of padding on average
    rows: int = 512
    interpret: Any = False


def rows_of_tile(share: int) -> int:
    """For groups of `share` rows on average: as large as it may be with a quarter of all rows
    padding. 512 rows a tile keep the matrix units of a v5e, v5p and TPU7x busy by their data sheets
    (2 x 512 x 1024 FLOPs to 2 x (512 + 1024) bytes: 341 FLOPs a byte); a v6e would want 560.
    """
    return max(128, min(512, 1 << max(share // 2, 1).bit_length() - 1))


def tile_width(size: int, dtype: Any) -> int:
    """Of a dimension that is cut: the multiple of 128 that pads it least, at most 2 KiB of it and
    at least half that. 512 rows by twice 2 KiB take 10 of the 16 MiB of vector memory that a kernel
    gets on a v5e or v5p.
    """
    most = 2_048 // jnp.dtype(dtype).itemsize
    return (
        size
        if size <= most
        else min(range(most, most // 2 - 1, -128), key=lambda width: -(-size // width) * width)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox(x_SD: Array, w_EDF: Array, counts_E: Array, tiles: Tiles = Tiles()) -> Array:
    """Row s times its group's matrix, in x's dtype, summed in float32.

    Args:
      x_SD: bfloat16 or float32; w_EDF is alike.
      counts_E: int32, rows of each group, in order: any, zeros too.

    Rows beyond the sum of counts are nobody's: whatever they hold, NaN too, reaches no other row
    and no gradient to the weights. Nor are they written: their results and gradients hold what the
    memory held. To write zeros there would cost a pass over the whole array, most of which is
    nobody's where tokens are gathered over the expert axis.
    """
    return _by_rows(x_SD, w_EDF, counts_E, tiles, transposed=False)


def _by_rows(
    x_SD: Array, w_EDF: Array, counts_E: Array, tiles: Tiles, *, transposed: bool
) -> Array:
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


def _by_groups(x_SD: Array, dy_SF: Array, counts_E: Array, dtype: Any, tiles: Tiles) -> Array:
    tiling = tiles.rows, *(tile_width(size, x_SD.dtype) for size in (x_SD.shape[1], dy_SF.shape[1]))
    # The kernel transposes what it is given back again.
    return tgmm(
        _whole_tiles(x_SD, tiles).T,
        _whole_tiles(dy_SF, tiles),
        counts_E,
        dtype,
        tiling,
        interpret=tiles.interpret,
    )


def _whole_tiles(x_SD: Array, tiles: Tiles) -> Array:
    return padded(x_SD, 0, -(-x_SD.shape[0] // tiles.rows) * tiles.rows)


def _backward(tiles: Tiles, saved, dy_SF: Array):
    x_SD, w_EDF, counts_E = saved
    return (
        _by_rows(dy_SF, w_EDF, counts_E, tiles, transposed=True),
        _by_groups(x_SD, dy_SF, counts_E, w_EDF.dtype, tiles),
        None,
    )


megablox.defvjp(
    lambda x_SD, w_EDF, counts_E, tiles: (
        megablox(x_SD, w_EDF, counts_E, tiles),
        (x_SD, w_EDF, counts_E),
    ),
    _backward,
)


def tokamax(x_SD: Array, w_EDF: Array, counts_E: Array, kernels: str | tuple[str, ...]) -> Array:
    """As `megablox`, by the kernels of these names, which bring their own backward pass. On TPU
    they raise NotImplementedError for widths below 128.
    """
    import tokamax

    S = x_SD.shape[0]
    return tokamax.ragged_dot(
        padded(x_SD, 0, max(S, 128)), w_EDF, counts_E, implementation=kernels
    )[:S]  # nor do they take fewer rows


def preferred(platform: str) -> str:
    """What "auto" takes; "" where there is none."""
    if platform == "gpu" and importlib.util.find_spec("tokamax"):
        return "tokamax"
    return "megablox" if platform == "tpu" else ""


def pick(name: str, platform: str, share: int) -> tuple[GroupedMatmul, int]:
    """(the matmul, the rows on whose multiples groups had best begin) for groups of `share` rows on
    average.

    Raises UserError where it does not run or is not installed.
    """
    if platform not in PLATFORMS[name]:
        raise UserError(
            f'model.expert_matmul = "{name}": runs on {" and ".join(PLATFORMS[name])}, and this is {platform}; "auto" takes what there is'
        )
    if name == "megablox":
        tiles = Tiles(rows_of_tile(share))
        return functools.partial(megablox, tiles=tiles), tiles.rows
    if importlib.util.find_spec("tokamax") is None:
        raise UserError(
            'model.expert_matmul = "tokamax": it is not installed; pip install tokamax (Python 3.12 or newer), or take "auto"'
        )
    return functools.partial(tokamax, kernels=TOKAMAX_KERNELS[platform]), 1
