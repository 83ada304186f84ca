"""The forms of attention: tables that choose the function which computes it.

| over | form | where | function |
|---|---|---|---|
| a whole sequence | "chunks" | CPU, GPU; short rows on TPU | reference.attend_expanded |
| a whole sequence | "tiles" | TPU; on request Hopper; interpreted on a CPU | tiled.attend_tiled |
| its selected latents | "gathered" | stage "sparse" on a CPU | selected.attend_selected |
| cached keys and values | | everywhere | decode.attend_cached |
| cached latents | `LATENT_FORMS` | FEW queries a row, selected | decode.attend_gathered, ... |
| cached latents | | everything else | decode.attend_masked |

All forms over the same thing compute the same function. The layers call `sequence_form` or
`latent_form` and then what it returns. Which attention a layer has is a table of its own,
model/layers/table.py.
"""

import functools
from collections.abc import Callable

from jax import Array

from errors import UserError
from kernels.device import ambient_device, platform
from kernels.tiles import MIN_VMEM, vmem_bytes
from model.attention.caches import LatentCache
from model.attention.decode import (
    attend_gathered,
    attend_listed,
    attend_masked,
    attend_one_by_one,
    attend_tiles,
)
from model.attention.reference import IndexerStats, attend_expanded
from model.attention.tiled import KERNELS, MIN_TILED, attend_tiled
from model.config import ModelConfig

# On a CPU gathering takes less time than masking where a row is this many times as long as the keys
# that are selected (`python -m bench.sparse_train` measures it).
GATHER_RATIO = 12
# As many queries a row read what each selects one after the other: those of drafts, not those of
# a chunk of a turn.
FEW = 8

SequenceForm = Callable[..., tuple[Array, IndexerStats, Array | None]]
LatentForm = Callable[..., tuple[Array, Array | None]]

# (layout of the cache, platform) -> how one query a row reads the latents that it selects.
LATENT_FORMS: dict[tuple[str, str], LatentForm] = {
    ("rows", "cpu"): attend_gathered,
    ("rows", "gpu"): attend_listed,  # a GPU's `top_k` of many sorts the whole row
    ("tiles", "tpu"): attend_tiles,
    ("tiles", "cpu"): attend_tiles,  # interpreted, in tests
}


def sequence_form(config: ModelConfig, length: int) -> SequenceForm:
    """Returns the form of attention over keys and values of a whole sequence.

    It is `attend_expanded` or `attend_tiled`; `gathers_latents` says where neither is called. It
    depends on `model.attention_form`, the platform and kind of device, and the tokens of a row.
    Raises UserError where tiles are asked for and there are no kernels for the platform.
    """
    roomy = platform() == "tpu" and vmem_bytes(ambient_device().device_kind) >= MIN_VMEM
    tiled = config.attention_form == "tiles" or (
        config.attention_form == "auto" and roomy and length >= MIN_TILED
    )
    if not tiled:
        return functools.partial(
            attend_expanded, query_chunk=config.query_chunk, causal_parts=config.causal_parts
        )
    if platform() not in KERNELS:
        raise UserError(
            f"model.attention_form = {config.attention_form!r}: there are no kernels for "
            f"{platform()}; take 'chunks'"
        )
    return functools.partial(attend_tiled, kernels=KERNELS[platform()])


def gathers_latents(config: ModelConfig, stage: str, length: int) -> bool:
    """Tells whether attention over a whole sequence reads the selected latents alone.

    It depends on `model.attention_form`, the platform, the stage, and how many of a row's keys are
    selected.
    """
    wins = platform() == "cpu" and length >= GATHER_RATIO * config.indexer.topk
    wanted = config.attention_form == "gathered" or (config.attention_form == "auto" and wins)
    return stage == "sparse" and length > config.indexer.topk and wanted


def latent_form(cache: LatentCache, queries: int, topk: int | None) -> LatentForm:
    """Returns the form of attention of new tokens over cached latents.

    More than FEW queries a row, or as many selected as there are slots, read every latent. So do
    few queries on TPU where the cache is rows, below `sparse_decode.CROSSOVER` slots: it takes less
    time there than fetching the selected ones.

    Args:
      cache: the cache, for its layout and its number of slots.
      queries: new tokens a row.
      topk: how many slots the indexer selects; None attends without an indexer.
    """
    slots = cache.latent_BSR.shape[1]
    if queries > FEW or topk is None or topk >= slots:
        return attend_masked
    form = LATENT_FORMS.get((cache.layout, platform()), attend_masked)
    if queries == 1 or form is attend_masked:
        return form
    return functools.partial(attend_one_by_one, form)
