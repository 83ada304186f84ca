"""The table of the forms of attention over a whole sequence."""

import functools
from collections.abc import Callable

from errors import UserError
from kernels.device import ambient_device, platform
from kernels.tiles import MIN_VMEM, vmem_bytes
from model.attention.reference import attend_expanded
from model.attention.tiled import KERNELS, LEAST_TILED, attend_tiled
from model.config import ModelConfig


def expanded_form(config: ModelConfig, length: int) -> Callable:
    """The table: (config.attention_form, platform and kind of device, tokens of a row) ->
    `attend_expanded` or `attend_tiled`.
    """
    roomy = platform() == "tpu" and vmem_bytes(ambient_device().device_kind) >= MIN_VMEM
    tiled = config.attention_form == "tiles" or (
        config.attention_form == "auto" and roomy and length >= LEAST_TILED
    )
    if not tiled:
        return functools.partial(
            attend_expanded, query_chunk=config.query_chunk, causal_parts=config.causal_parts
        )
    if platform() not in KERNELS:
        raise UserError(
            f"model.attention_form = {config.attention_form!r}: there are no kernels for {platform()}; take 'chunks'"
        )
    return functools.partial(attend_tiled, kernels=KERNELS[platform()])
