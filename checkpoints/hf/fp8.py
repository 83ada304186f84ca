"""DeepSeek's FP8 weights (arXiv 2412.19437, section 3.3).

They are float8 matrices, with a float32 factor for each block of, mostly, 128 x 128. The factors of
the matrix NAME are the matrix `NAME_scale_inv`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from errors import UserError

SCALE_SUFFIX = "_scale_inv"


def block_shape(config: Mapping[str, Any], path: object) -> tuple[int, int]:
    """Returns the rows and columns that share a factor, as a config.json says.

    Args:
      config: the keys of config.json.
      path: the file, for the error.

    Raises:
      UserError: the checkpoint is quantised in another way.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise UserError(f'{path}: "quantization_config": must be an object')
    method = settings.get("quant_method", "fp8")
    if method != "fp8":
        raise UserError(
            f'{path}: "quant_method": "{method}" is not supported, only fp8 in blocks with'
            " float32 scales"
        )
    block = settings.get("weight_block_size") or [128, 128]
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(
            f'{path}: "weight_block_size": {str(block)[:80]}: must be two whole numbers'
        )
    rows, columns = block
    return rows, columns


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of the factors of a matrix: its blocks, the last ones cut off."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def scale_rows(start: int, stop: int, block: tuple[int, int]) -> tuple[int, int]:
    """Returns which rows of the factors belong to the rows from `start` to `stop` of a matrix."""
    return start // block[0], -(-stop // block[0])


def multiply_out(
    rows: np.ndarray, start: int, scale: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    """Returns float8 rows times their factors, in float32.

    Args:
      rows: rows of a matrix from `start` on, float8.
      start: the number of the first of them.
      scale: the factors of these rows, as `scale_rows` finds them.
      block: rows and columns that share a factor.
    """
    offset = start % block[0]
    scale = np.repeat(scale.astype(np.float32), block[0], axis=0)[offset : offset + len(rows)]
    scale = np.repeat(scale, block[1], axis=1)[:, : rows.shape[1]]
    return rows.astype(np.float32) * scale
