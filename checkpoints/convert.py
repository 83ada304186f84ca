"""Hugging Face checkpoints become workdirs, and workdirs become Hugging Face checkpoints.

Both ways handle a few rows of a tensor at a time: memory does not grow with the checkpoint. Both
can be stopped, and go on from there when they are called again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.layouts import Tensor
from checkpoints.hf.metadata import (
    config_for,
    keep_record,
    recorded_dtypes,
    recorded_origin,
    write_other_files,
)
from checkpoints.hf.safetensors_writer import SHARD_BYTES, TensorWriter
from checkpoints.hf.tensors import experts_are_fused, tensors
from checkpoints.locations import HF_RECORD, run_directory
from checkpoints.lora import open_run
from checkpoints.streamed import StreamedWriter
from checkpoints.trees import by_path
from data.tokenizer import Tokenizer
from data.tokenizer_files import has_tokenizer, load_tokenizer
from model.adapters import COLLECTION, adapted
from model.config import ModelConfig
from model.transformer import boxed_shapes

BLOCK = 8 * 2**20  # elements of a tensor that are in memory at a time
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Block = tuple[Tensor, int, int]  # a tensor, and the rows of it from a start to a stop
# Yields the blocks that it is given, and may show how many are done.
Track = Callable[[Sequence[Block]], Iterable[Block]]


def import_checkpoint(
    checkpoint: HFCheckpoint, workdir: Path, dtype: str, track: Track = iter
) -> int | None:
    """Writes a Hugging Face checkpoint into a workdir, as its checkpoint of step 0.

    The workdir also gets the tokenizer, and in hf/ what else the checkpoint came with.

    Args:
      checkpoint: where the values come from.
      workdir: the workdir; its config is recorded by the caller.
      dtype: of the parameters, "float32" or "bfloat16". The router's biases are float32 whatever it
        is, since steps move them by a thousandth.
      track: yields the blocks that it is given, and may show progress.

    Returns:
      The number of parameters, or None if the workdir has this checkpoint already.

    Raises:
      UserError: the workdir cannot be written, or has another checkpoint; a tensor that should be a
        copy of another differs from it.
    """
    directory = checkpoint.directory
    origin = str(directory.resolve())
    if (workdir / "checkpoints" / "0").exists() and recorded_origin(workdir) == origin:
        return None
    keep_record(directory, workdir, checkpoint.files.dtypes)
    if has_tokenizer(directory):
        load_tokenizer(directory).save(workdir / "tokenizer.json")
    checkpoint.check_copies()
    state = _abstract_variables(checkpoint.model, DTYPES[dtype])
    leaves = by_path(state)
    writer = StreamedWriter(
        workdir / "checkpoints",
        0,
        state,
        source=f"{origin}, {dtype}",
        chunks=_chunks(checkpoint.own_tensors),
    )
    for tensor, start, stop in track(_blocks(checkpoint.own_tensors)):
        name = f"{tensor.name}:{start}"
        if name in writer.done:
            continue
        for part, values in tensor.decode(checkpoint.rows(tensor.name, start, stop), start):
            # No name keeps the converted values: they are gone when they are on the disk.
            leaf_dtype = leaves[part.leaf].dtype
            writer.write(part.leaf, part.index, np.ascontiguousarray(values, leaf_dtype))
        writer.mark(name)
    writer.finish()
    return sum(leaf.size for leaf in leaves.values())


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A model whose tensors can be written as a Hugging Face checkpoint.

    Attributes:
      model: the model, with its vocabulary filled in.
      rows: returns rows of a tensor, from a start to a stop.
      dtypes: the type of each tensor that it had as a Hugging Face checkpoint; empty if it comes
        from none.
      record: a directory with what else that checkpoint had.
      name: where the values come from.
      tokenizer: the run's, if it is one.
      chat_template: the Jinja by which the run chats, where it is a template of ours.
      context: the longest row that the run trains or samples, in tokens; 0 if it is no run.
    """

    model: ModelConfig
    rows: Callable[[Tensor, int, int], np.ndarray]
    dtypes: Mapping[str, np.dtype]
    record: Path | None
    name: str
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    context: int = 0


def source_of_checkpoint(checkpoint: HFCheckpoint) -> ExportSource:
    """Returns a Hugging Face checkpoint as the source of another one."""

    def rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
        return checkpoint.rows(tensor.name, start, stop)

    directory = checkpoint.directory
    return ExportSource(
        model=checkpoint.model,
        rows=rows,
        dtypes=checkpoint.files.dtypes,
        record=directory,
        name=str(directory.resolve()),
    )


def source_of_run(
    path: Path,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    context: int,
) -> ExportSource:
    """Returns the newest checkpoint of a run as the source of a Hugging Face checkpoint.

    Adapters are added to what they adapt.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      model: the run's model, with its vocabulary filled in.
      tokenizer, chat_template, context: as in `ExportSource`.

    Raises:
      UserError: no checkpoint there.
    """
    reader, workdir = open_run(path), run_directory(path)

    name = str(reader.checkpoint.resolve())
    return _source(reader.read, workdir, model, tokenizer, chat_template, context, name)


def source_of_policy(
    variables: dict[str, Any],
    workdir: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    chat_template: str | None,
    context: int,
    name: str,
) -> ExportSource:
    """Returns variables {"params", "router"} of a run as the source of a Hugging Face checkpoint.

    They are copied to the host leaf by leaf, as they are asked for, and stay there with the source.
    Adapters are added to what they adapt.

    Args:
      workdir: the run's, which has what else its checkpoint came with.
      model: the run's model, with its vocabulary filled in.
      tokenizer, chat_template, context, name: as in `ExportSource`.
    """
    leaves = by_path(variables)

    @functools.cache
    def on_host(leaf: str) -> np.ndarray:
        factors = {name: f"{COLLECTION}/{leaf.removeprefix('params/')}/{name}" for name in "ab"}
        if factors["a"] not in leaves:
            return np.asarray(leaves[leaf])
        return np.asarray(adapted(leaves[leaf], {n: leaves[path] for n, path in factors.items()}))

    def read(leaf: str, index: Any) -> np.ndarray:
        return on_host(leaf)[index]

    return _source(read, workdir, model, tokenizer, chat_template, context, name)


def _source(
    read: Callable[[str, Any], np.ndarray],
    workdir: Path,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    context: int,
    name: str,
) -> ExportSource:
    """Returns what exports read of a run.

    Args:
      read: (path of a leaf, index) -> that part of it.
    """

    def rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
        parts = tensor.slices_of(start, stop)
        return tensor.encode([read(part.leaf, part.index) for part in parts])

    record = workdir / HF_RECORD
    return ExportSource(
        model=model,
        rows=rows,
        dtypes=recorded_dtypes(workdir),
        record=record if record.exists() else None,
        name=name,
        tokenizer=tokenizer,
        chat_template=chat_template,
        context=context,
    )


def check_exports(source: ExportSource, dtype: str) -> None:
    """Raises UserError if no architecture can express the model; see `export_checkpoint`."""
    _planned(source, dtype)


def export_checkpoint(
    source: ExportSource, directory: Path, dtype: str, track: Track = iter
) -> int:
    """Writes a model as a Hugging Face checkpoint.

    Args:
      source: the model.
      directory: where the checkpoint goes.
      dtype: of the tensors, a name of DTYPES; "" keeps the types that they had.
      track: yields the blocks that it is given, and may show progress.

    Returns:
      The number of tensors.

    Raises:
      UserError: the directory cannot be written or has another checkpoint, or no architecture can
        express the model.
    """
    written, dtypes, config = _planned(source, dtype)
    plan = [(tensor.name, dtypes[tensor.name], tensor.shape) for tensor in written]
    described = f"{source.name}, {dtype or 'the types it had'}"
    with TensorWriter(directory, plan, described, SHARD_BYTES) as writer:
        for tensor, start, stop in track(_blocks(written)):
            if tensor.name not in writer.done:
                # No name keeps the rows, so that they are gone when the next are read.
                writer.write(
                    tensor.name,
                    np.ascontiguousarray(source.rows(tensor, start, stop), dtypes[tensor.name]),
                )
    write_other_files(directory, source.record, source.tokenizer, source.chat_template, config)
    return len(written)


def _planned(
    source: ExportSource, dtype: str
) -> tuple[list[Tensor], dict[str, np.dtype], dict[str, Any]]:
    """Returns the tensors that an export has, the type of each by its name, and its config.json."""
    written = _written_tensors(source)
    dtypes = {tensor.name: _export_dtype(tensor.name, source.dtypes, dtype) for tensor in written}
    projections = {str(dtypes[name]) for name in dtypes if name.endswith("proj.weight")}
    config = config_for(source.model, source.record, source.dtypes, dtypes, projections)
    if source.context:
        config.setdefault("max_position_embeddings", source.context)
    return written, dtypes, config


def _written_tensors(source: ExportSource) -> list[Tensor]:
    """Returns the tensors that an export has.

    Copies are those that the checkpoint had. A model that comes from no checkpoint is written as
    the releases are, where an MTP module has its copies.
    """
    all_copies = not source.dtypes and not source.model.tie_word_embeddings
    return [
        tensor
        for tensor in tensors(source.model, experts_are_fused(source.dtypes))
        if not tensor.copy_of or tensor.name in source.dtypes or all_copies
    ]


def _export_dtype(name: str, dtypes: Mapping[str, np.dtype], wanted: str) -> np.dtype:
    """Returns the type that a tensor is written in.

    Float8 is read and not written: its products with their scales are float32's. The router's
    biases are sums of thousandths, and float32 as released.
    """
    float32 = DTYPES["float32"]
    if wanted:
        return float32 if name.endswith("e_score_correction_bias") else DTYPES[wanted]
    before = dtypes.get(name, float32)
    return float32 if before.itemsize == 1 else before


def _abstract_variables(model: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Returns {"params", "router"}, parameters in `dtype` and the router's biases in float32."""
    shapes = nn.meta.unbox(boxed_shapes(model))
    return {
        collection: jax.tree.map(
            lambda leaf, to=to: jax.ShapeDtypeStruct(leaf.shape, to), shapes[collection]
        )
        for collection, to in (("params", dtype), ("router", DTYPES["float32"]))
    }


def _chunks(written: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the chunks of each leaf.

    A chunk is what one block of a tensor's rows writes of the leaf, so that no chunk is written
    twice.
    """
    return {
        part.leaf: part.shape
        for tensor in written
        for part in tensor.slices_of(*next(tensor.blocks(BLOCK)))
    }


def _blocks(written: Sequence[Tensor]) -> list[Block]:
    return [(tensor, start, stop) for tensor in written for start, stop in tensor.blocks(BLOCK)]
