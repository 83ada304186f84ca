"""Converts a Hugging Face checkpoint into a workdir, and back.

    python -m launch.convert --from=hf:DeepSeek-V3 --to=runs/v3
    python -m launch.convert --from=runs/v3-chat --to=hf:v3-chat
    python -m launch.convert --from=hf:DeepSeek-V3 --to=hf:v3-bf16 --dtype=bfloat16
    python -m launch.convert --from=runs/v3-lora --to=peft:v3-lora

The second writes each tensor in the type that it had in DeepSeek-V3, the third writes its FP8
weights out. Memory does not grow with the checkpoint: a few rows of a tensor are handled at a time.
If the command is stopped, the same command goes on from there. Of a run that learnt by adapters
(train.lora) the second writes their sum with what they adapt, and the fourth the adapters alone, in
peft's format.

A workdir has parameters in float32 (or with --dtype=bfloat16, on half the disk), the tokenizer, and
in hf/ what else the checkpoint came with. Any command starts from it (--config.init_from=runs/v3),
and none needs it to: hf:DIR does as well.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoints.convert import (
    DTYPES,
    Block,
    ExportSource,
    export_checkpoint,
    import_checkpoint,
    source_of_checkpoint,
    source_of_run,
)
from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.peft import write_adapters
from checkpoints.locations import HF_PREFIX, PEFT_PREFIX, hf_directory, run_directory
from checkpoints.lora import adapters_of, recorded_lora
from data.chat import jinja_of
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.lock import locked
from experiment.schema import Config, parse
from experiment.setup import with_vocab_size
from experiment.workdir import record_config, recorded_config
from model.config import ModelConfig
from train.progress import Progress

FLAGS = {
    "from": Flag("", "hf:DIR, or the workdir of a run"),
    "to": Flag("", "a workdir, or hf:DIR; peft:DIR for the adapters of a run"),
    "dtype": Flag(
        "",
        "of the result; by default float32 in a workdir, and in hf:DIR what the tensors had where"
        " they came from",
        choices=("", *DTYPES),
    ),
}


def run(to: str, dtype: str, **source: str) -> None:
    """Converts --from (a word that Python has taken) to `to`."""
    origin = source["from"]
    if not origin or not to:
        raise UserError("--from and --to are both needed, such as --from=hf:DIR --to=runs/model")
    if to.startswith(PEFT_PREFIX):
        _write_adapters(origin, Path(to[len(PEFT_PREFIX) :]), dtype)
        return
    if not origin.startswith(HF_PREFIX) and not to.startswith(HF_PREFIX):
        raise UserError(
            f"--from={origin} --to={to}: one of the two must be a Hugging Face checkpoint, hf:DIR"
        )
    if to.startswith(HF_PREFIX):
        blocks = _Shown(f"{origin} to {to}")
        count = export_checkpoint(_export_source(origin), Path(to[len(HF_PREFIX) :]), dtype, blocks)
        print(f"{to}: {count:,} tensors")
    else:
        _into_workdir(origin, Path(to), dtype)


def _into_workdir(origin: str, workdir: Path, dtype: str) -> None:
    if dtype == "float16":
        raise UserError("--dtype=float16: a workdir's parameters are float32 or bfloat16")
    config = _config_of(origin)
    checkpoint = _hf_checkpoint(origin, config)
    blocks = _Shown(f"{origin} to {workdir}")
    with locked(workdir):
        record_config(workdir, dataclasses.replace(config, init_from=""), "convert")
        count = import_checkpoint(checkpoint, workdir, dtype or "float32", blocks)
    print(f"{workdir}: " + ("has it already" if count is None else f"{count:,} parameters"))


def _write_adapters(origin: str, directory: Path, dtype: str) -> None:
    """Writes the adapters of a run in peft's format.

    Raises UserError where the origin is no run that learnt by adapters.
    """
    record = None if origin.startswith(HF_PREFIX) else recorded_lora(origin)
    if record is None:
        raise UserError(
            f"--from={origin} --to={PEFT_PREFIX}{directory}: no run with adapters (train.lora); "
            "write its parameters to hf:DIR"
        )
    if dtype:
        raise UserError(f"--dtype={dtype}: adapters are written in float32, as they learn")
    workdir = run_directory(origin)
    model, _ = _model_of(workdir, parse(recorded_config(workdir)))
    base = str(hf_directory(record.source) or "")
    adapters = adapters_of(Path(origin), record)
    written, left_out = write_adapters(
        directory, model, adapters, rank=record.rank, scale=record.scale, base=base
    )
    print(f"{PEFT_PREFIX}{directory}: adapters of {written:,} matrices")
    if left_out:
        print(f"left out: {left_out:,} of MTP modules, which transformers has not")


def _model_of(workdir: Path, config: Config) -> tuple[ModelConfig, Tokenizer | None]:
    """Returns a run's model, with its vocabulary filled in, and its tokenizer if it has one."""
    model, tokenizer = config.model, None
    if (workdir / "tokenizer.json").exists():
        tokenizer = load_tokenizer(workdir / "tokenizer.json")
    if not model.vocab_size:
        model = with_vocab_size(model, tokenizer or load_tokenizer(workdir / "tokenizer.json"))
    return model, tokenizer


def _export_source(origin: str) -> ExportSource:
    if hf_directory(origin) is not None:
        return source_of_checkpoint(_hf_checkpoint(origin, _config_of(origin)))
    workdir = run_directory(origin)
    config = parse(recorded_config(workdir))
    model, tokenizer = _model_of(workdir, config)
    sampled = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    context = max(config.data.seq_len, sampled)
    template = jinja_of(config.data.chat_template)
    return source_of_run(Path(origin), model, tokenizer, template, context)


def _config_of(origin: str) -> Config:
    """Returns the config of a model of hf:DIR. Raises UserError, which names it."""
    written = with_checkpoint_fields(base_config_from(origin), ())
    try:
        return parse(written)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def _hf_checkpoint(origin: str, config: Config) -> HFCheckpoint:
    return HFCheckpoint(Path(origin[len(HF_PREFIX) :]), config.model)


class _Shown:
    """Yields blocks of tensors, with a bar that moves when the next is asked for."""

    def __init__(self, label: str):
        self.label = label

    def __call__(self, blocks: Sequence[Block]) -> Iterator[Block]:
        with Progress(len(blocks), self.label, unit="parameters") as bar:
            for done, (tensor, start, stop) in enumerate(blocks, 1):
                yield tensor, start, stop
                bar.update(done, {}, (stop - start) * math.prod(tensor.shape[1:]))


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS)
