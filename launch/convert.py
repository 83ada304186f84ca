"""A Hugging Face checkpoint into a workdir of ours, and back, a few rows of a tensor at a time:
memory does not grow with the checkpoint.

    python -m launch.convert --from=hf:DeepSeek-V3 --to=runs/v3 python -m launch.convert
    --from=runs/v3-chat --to=hf:v3-chat                     each tensor in the type it had in
    DeepSeek-V3 python -m launch.convert --from=hf:DeepSeek-V3 --to=hf:v3-bf16 --dtype=bfloat16  its
    FP8 weights written out

Stopped, the same command again goes on where it was. A workdir holds parameters in float32 (or
--dtype=bfloat16: half the disk), the tokenizer, and in hf/ what else the checkpoint came with. Any
command starts from it (--config.init_from=runs/v3), and no command needs it to: hf:DIR does as
well.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from checkpoints.hf.load import HFCheckpoint
from checkpoints.hf.metadata import comes_from, config_for, keep_record, tensor_types, write_beside
from checkpoints.hf.safetensors import SHARD_BYTES, TensorWriter
from checkpoints.hf.tensors import Tensor, fused, tensors
from checkpoints.locations import HF, RECORD, hf_directory, run_directory
from checkpoints.streamed import StreamedReader, StreamedWriter
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.schema import Config, parse
from experiment.setup import with_vocab_size
from experiment.workdir import record_config, recorded_config
from model.config import ModelConfig
from train.progress import Progress
from train.state import boxed_shapes

BLOCK = 8 * 2**20  # elements of a tensor handled at a time
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def run(to: str, dtype: str, **origin: str) -> None:
    source = origin["from"]
    if not source or not to:
        raise UserError("--from and --to are both needed, such as --from=hf:DIR --to=runs/model")
    from_hf, to_hf = source.startswith(HF), to.startswith(HF)
    if not from_hf and not to_hf:
        raise UserError(
            f"--from={source} --to={to}: one of the two must be a Hugging Face checkpoint, hf:DIR"
        )
    if to_hf:
        export(source, Path(to[len(HF) :]), dtype)
    else:
        load_into(source, Path(to), dtype)


def load_into(source: str, workdir: Path, dtype: str) -> None:
    """hf:DIR into workdir/checkpoints/0."""
    if dtype == "float16":
        raise UserError("--dtype=float16: a workdir's parameters are float32 or bfloat16")
    dtype = dtype or "float32"
    directory, config = hf_directory(source), config_of(source)
    checkpoint = HFCheckpoint(directory, config.model)
    own = [tensor for tensor in checkpoint.tensors if not tensor.copy_of]
    state = abstract(config.model, DTYPES[dtype])
    types = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    chunks = {part.leaf: chunk_of(tensor, part.leaf) for tensor in own for part in tensor.parts}

    record_config(workdir, dataclasses.replace(config, init_from=""), "convert")
    if (workdir / "checkpoints" / "0").exists() and comes_from(workdir) == str(directory.resolve()):
        print(f"{workdir}: has it already")
        return
    keep_record(
        directory, workdir, {name: info.dtype for name, info in checkpoint.files.tensors.items()}
    )
    if (directory / "tokenizer.json").exists():
        load_tokenizer(directory / "tokenizer.json").save(workdir / "tokenizer.json")
    for tensor in checkpoint.tensors:
        if tensor.copy_of:
            for _ in checkpoint.pieces(tensor):  # which sees whether it is one
                pass
    writer = StreamedWriter(
        workdir / "checkpoints", 0, state, source=f"{directory.resolve()}, {dtype}", chunks=chunks
    )
    for tensor, start, stop in shown(own, f"{source} to {workdir}"):
        piece = f"{tensor.name}:{start}"
        if piece in writer.done:
            continue
        for part, where, values in tensor.decode(checkpoint.rows(tensor.name, start, stop), start):
            writer.write(
                part.leaf, (*part.index, *where), np.ascontiguousarray(values, types[part.leaf])
            )
        writer.mark(piece)
    writer.finish()
    print(f"{workdir}: {sum(leaf.size for leaf in jax.tree.leaves(state)):,} parameters")


def export(source: str, directory: Path, dtype: str) -> None:
    """A workdir, or another hf:DIR, into a directory of safetensors."""
    origin = opened(source)
    copies = (
        not origin.types and not origin.model.tie_word_embeddings
    )  # of a model that comes from no checkpoint: as released, where an MTP module has its copies
    written = [
        tensor
        for tensor in tensors(origin.model, fused(origin.types))
        if not tensor.copy_of or tensor.name in origin.types or copies
    ]
    # float8 is read and not written: its products with their scales are float32's. The router's
    # biases are sums of thousandths, and float32 as released.
    types = {}
    for tensor in written:
        there = origin.types.get(tensor.name, DTYPES["float32"])
        bias = tensor.name.endswith("e_score_correction_bias")
        types[tensor.name] = (
            DTYPES[dtype]
            if dtype and not bias
            else DTYPES["float32"]
            if there.itemsize == 1 or dtype
            else there
        )
    config = config_for(
        origin.model,
        origin.record,
        origin.types,
        {str(types[tensor.name]) for tensor in written if tensor.name.endswith("proj.weight")},
    )
    plan = [(tensor.name, types[tensor.name], tensor.shape) for tensor in written]
    with TensorWriter(
        directory,
        plan,
        source=f"{origin.name}, {dtype or 'the types it had'}",
        shard_bytes=SHARD_BYTES,
    ) as writer:
        for tensor, start, stop in shown(written, f"{source} to {HF}{directory}"):
            if tensor.name not in writer.done:
                writer.write(
                    tensor.name,
                    np.ascontiguousarray(origin.rows(tensor, start, stop), types[tensor.name]),
                )
    write_beside(directory, origin.record, origin.workdir, config)
    print(f"{HF}{directory}: {len(written):,} tensors")


class Origin(NamedTuple):
    """What is exported."""

    model: ModelConfig
    rows: Callable[[Tensor, int, int], np.ndarray]  # of a tensor, from start to stop
    types: dict[
        str, np.dtype
    ]  # of the tensors it had as a Hugging Face checkpoint, if ever it was one
    record: Path | None  # what else it had
    workdir: Path | None
    name: str


def opened(source: str) -> Origin:
    """A run's workdir, or hf:DIR."""
    directory = hf_directory(source)
    if directory is not None:
        checkpoint = HFCheckpoint(directory, config_of(source).model)
        types = {name: info.dtype for name, info in checkpoint.files.tensors.items()}
        return Origin(
            checkpoint.model,
            lambda tensor, *rows: checkpoint.rows(tensor.name, *rows),
            types,
            directory,
            None,
            str(directory.resolve()),
        )
    workdir = run_directory(source)
    model = parse(recorded_config(workdir)).model
    if not model.vocab_size:
        model = with_vocab_size(model, load_tokenizer(workdir / "tokenizer.json"))
    reader = StreamedReader(Path(source))

    def rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
        return tensor.encode(
            [
                reader.read(part.leaf, (*part.index, *where))
                for part, where in tensor.wanted(start, stop)
            ]
        )

    record = workdir / RECORD
    return Origin(
        model,
        rows,
        tensor_types(workdir),
        record if record.exists() else None,
        workdir,
        str(reader.checkpoint.resolve()),
    )


def config_of(source: str) -> Config:
    """Of hf:DIR. Raises UserError that names it."""
    written = with_checkpoint_fields(base_config_from(source), ())
    try:
        return parse(written)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def abstract(model: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """{"params", "router"} in `dtype`; the router's biases in float32 whatever it is, since steps
    move them by a thousandth.
    """
    shapes = jax.tree.map(
        lambda boxed: boxed.value, boxed_shapes(model), is_leaf=lambda leaf: hasattr(leaf, "names")
    )
    return {
        "params": jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape.shape, dtype), shapes["params"]
        ),
        "router": jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape.shape, np.dtype(np.float32)), shapes["router"]
        ),
    }


def chunk_of(tensor: Tensor, leaf: str) -> tuple[int, ...]:
    """What one block of a tensor's rows writes of a leaf: so no chunk is written twice."""
    start, stop = next(tensor.blocks(BLOCK))
    part, where = next(
        (part, where) for part, where in tensor.wanted(start, stop) if part.leaf == leaf
    )
    return (*(1 for _ in part.index), *(cut.stop - cut.start for cut in where))


def shown(chosen: list[Tensor], label: str) -> Iterator[tuple[Tensor, int, int]]:
    """(tensor, start, stop) of every block of rows, with a bar that moves when the next is asked
    for.
    """
    total, done = sum(1 for tensor in chosen for _ in tensor.blocks(BLOCK)), 0
    with Progress(total, label, unit="parameters") as bar:
        for tensor in chosen:
            for start, stop in tensor.blocks(BLOCK):
                yield tensor, start, stop
                done += 1
                bar.update(done, {}, (stop - start) * math.prod(tensor.shape[1:]))


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={
            "from": Flag("", "hf:DIR, or the workdir of a run"),
            "to": Flag("", "a workdir, or hf:DIR"),
            "dtype": Flag(
                "",
                "of the result; by default float32 in a workdir, and in hf:DIR what the tensors had where they came from",
                choices=("", *DTYPES),
            ),
        },
    )
