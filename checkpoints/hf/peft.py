"""Adapters as Hugging Face's peft has them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight     [out, rank]

A torch Linear that is several of our matrices (a head's keys and values, its queries and gates) has
the factors of all of them, one below the other in lora_A and block by block in lora_B: its rank is
the sum of theirs. Routed experts have names of their own, as on disk, which peft joins where
transformers (from 5 on) has all experts in one parameter; such a joined one is read too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from checkpoints.hf.config import config_json
from checkpoints.hf.layouts import Slice, Tensor, Transposed
from checkpoints.hf.peft_files import Factors, adapter_config, read_modules, write_modules
from checkpoints.hf.tensors import tensors
from errors import UserError
from model.adapters import adapter_boxes
from model.config import ModelConfig
from model.sharding import STACKING_AXES, Named, is_named
from model.transformer import boxed_shapes

Adapter = Mapping[str, np.ndarray]  # {"a", "b"} of one of our matrices, layers and experts stacked


def write_adapters(
    directory: Path,
    model: ModelConfig,
    adapters: Mapping[str, Adapter],
    *,
    rank: int,
    scale: float,
    base: str,
) -> tuple[int, int]:
    """Writes adapters as a directory that peft reads.

    Args:
      adapters: by the path of the matrix, unscaled.
      rank, scale: of each.
      base: the Hugging Face checkpoint that they are of, or "" where none is known.

    Returns:
      How many Linears have factors, and how many are left out: those of MTP modules, which
      transformers has not.

    Raises:
      UserError: no architecture can express the model, or the directory cannot be written.
    """
    config_json(model, "float32")  # which refuses what cannot be
    linears = {_module(tensor.name): tensor for tensor in _linears(model)}
    adapted = {name: tensor for name, tensor in linears.items() if _adapted(tensor, adapters)}
    written = {name: tensor for name, tensor in adapted.items() if not _is_mtp(tensor)}
    for name in list(written):  # one parameter has both, so both have factors
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            if ".experts." in name and name.endswith(one):
                twin = name.removesuffix(one) + other
                written[twin] = linears[twin]
    factors = {
        name: _joined(tensor, adapters, rank, scale)
        for name, tensor in linears.items()
        if name in written
    }
    own = [name for name, tensor in linears.items() if not _is_mtp(tensor)]
    config = adapter_config(own, factors, rank, scale, base, experts=model.moe_layers > 0)
    write_modules(directory, factors, config)
    return len(factors), len(adapted) - sum(name in written for name in adapted)


def read_adapters(
    directory: Path, model: ModelConfig, matrices: Sequence[str], rank: int, scale: float
) -> dict[str, dict[str, np.ndarray]]:
    """Reads adapters of peft's format.

    Factors of a smaller rank leave room, which `known` tells. Where one Linear is several of our
    matrices, factors that add nothing to one of them are left out there, where room is short.

    Args:
      matrices: the paths of those that may have adapters.
      rank, scale: of ours; B is divided by the scale, and multiplied by that of the directory.

    Returns:
      By the path of the matrix {"a", "b", "known"}, layers and experts stacked: float32 factors, 0
      where the directory has none, and bool [*stacked, rank], which of them it has.

    Raises:
      UserError: there are no such files, they ask for what is no LoRA, or have factors of what the
        model or `matrices` has not, or of a larger rank.
    """
    modules, boxes = read_modules(directory, model), _boxes(model)
    found = {}
    for path in matrices:
        of = adapter_boxes(boxes[path], rank)
        stacked = of["a"].value.shape[: sum(name in STACKING_AXES for name in boxes[path].names)]
        found[path] = {
            "a": np.zeros(of["a"].value.shape, np.float32),
            "b": np.zeros(of["b"].value.shape, np.float32),
            "known": np.zeros((*stacked, rank), bool),
        }
    for tensor in _linears(model):
        factors = modules.pop(_module(tensor.name), None)
        if factors is not None:
            _take_apart(directory, tensor, factors, found, scale)
    if modules:
        name = min(modules)
        raise UserError(f"{directory}: {name} has adapters, and the model has no such matrix")
    return found


def _linears(model: ModelConfig) -> list[Tensor]:
    """Returns the tensors of a checkpoint that are matrices, in its order."""
    return [
        tensor
        for tensor in tensors(model)
        if isinstance(tensor.layout, Transposed) and not tensor.copy_of
    ]


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _path(part: Slice) -> str:
    return part.leaf.removeprefix("params/")


def _is_mtp(tensor: Tensor) -> bool:
    return _path(tensor.slices[0]).startswith("mtp_")


def _adapted(tensor: Tensor, adapters: Mapping[str, Any]) -> bool:
    return any(_path(part) in adapters for part in tensor.slices)


def _joined(tensor: Tensor, adapters: Mapping[str, Adapter], rank: int, scale: float) -> Factors:
    """Returns the factors of a Linear: of each of our matrices in it that has an adapter.

    One that has none gets rows of zeros in lora_B, and a Linear without any such factors of 0.
    """
    present = [part for part in tensor.slices if _path(part) in adapters]
    rows, columns = tensor.shape
    a, total = np.zeros((max(len(present), 1) * rank, columns), np.float32), 0
    layout = _of_rank(tensor, len(a))
    groups = rows // sum(layout.widths)
    values = [np.zeros((len(a), groups * width), np.float32) for width in layout.widths]
    for part, value in zip(tensor.slices, values, strict=True):
        if part in present:
            of = adapters[_path(part)]
            of_a, of_b = _index(part, of["a"], of["b"])
            a[total : total + rank] = of["a"][of_a].reshape(columns, rank).T
            value[total : total + rank] = of["b"][of_b].reshape(rank, -1)
            total += rank
    b = layout.encode(values).reshape(rows, len(a))
    return Factors(a, b, scale)


def _take_apart(
    directory: Path,
    tensor: Tensor,
    factors: Factors,
    found: Mapping[str, Mapping[str, np.ndarray]],
    scale: float,
) -> None:
    """Puts the factors of a Linear into those of our matrices in it.

    Raises UserError where the rank is too large, or a matrix with factors has no place in `found`.
    """
    inner = len(factors.a)
    if factors.a.shape != (inner, tensor.shape[1]) or factors.b.shape != (tensor.shape[0], inner):
        raise UserError(
            f"{directory}: the adapter of {_module(tensor.name)} is {list(factors.b.shape)} x "
            f"{list(factors.a.shape)}, and the matrix {list(tensor.shape)}"
        )
    values = _of_rank(tensor, inner).decode(factors.b)
    for number, (part, value) in enumerate(zip(tensor.slices, values, strict=True)):
        adds = np.any(value != 0, axis=1)
        of = found.get(_path(part))
        if of is None and not adds.any():
            continue
        if of is None:
            raise UserError(
                f"{directory}: {_module(tensor.name)} has adapters, and {_path(part)} has none in "
                "this run; name it in train.lora_modules"
            )
        rank = of["a"].shape[-1]
        if (needed := int(adds.sum())) > rank:
            raise UserError(
                f"{directory}: the adapter of {_module(tensor.name)} has rank {needed}; give "
                f"train.lora at least that"
            )
        # Those that add something, then those that stand where this matrix has its own.
        own = np.arange(inner) * len(tensor.slices) // inner == number
        kept = np.sort(np.argsort(-(2 * adds + own), kind="stable")[:rank])
        of_a, of_b = _index(part, of["a"], of["b"])
        room_a, room_b = of["a"][of_a], of["b"][of_b]
        known = of["known"][part.index[: of["known"].ndim - 1]]
        new_a = np.zeros((tensor.shape[1], rank), np.float32)
        new_a[:, : len(kept)] = factors.a[kept].T
        new_b = np.zeros((rank, value.shape[1]), np.float32)
        new_b[: len(kept)] = value[kept] * np.float32(factors.scale / scale)
        room_a[...], room_b[...] = new_a.reshape(room_a.shape), new_b.reshape(room_b.shape)
        known[..., : len(kept)] = True


def _of_rank(tensor: Tensor, rank: int) -> Transposed:
    """Returns the layout of lora_B, [out, rank]: that of the Linear, with other columns."""
    return Transposed(rank, cast(Transposed, tensor.layout).widths)


def _index(part: Slice, a: np.ndarray, b: np.ndarray) -> tuple[tuple, tuple]:
    """Returns which part of A and of B belongs to a slice of a matrix: whole along the rank."""
    stacked = a.ndim + b.ndim - 2 - len(part.index)
    inputs = a.ndim - 1 - stacked
    whole = slice(None)
    of_b = (*part.index[:stacked], whole, *part.index[stacked + inputs :])
    return (*part.index[: stacked + inputs], whole), of_b


def _boxes(model: ModelConfig) -> dict[str, Named]:
    leaves = jax.tree_util.tree_leaves_with_path(boxed_shapes(model)["params"], is_leaf=is_named)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): box for path, box in leaves}
