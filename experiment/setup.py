"""The beginning of every run: compilation cache, mesh, tokenizer and the model's vocabulary.

A few lines then say what is about to run.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from checkpoints.hf.config import export_refusals
from checkpoints.hf.metadata import inherit_record
from checkpoints.locations import hf_directory, run_directory
from data.chat import spelled_out
from data.tasks.spec import register_tasks
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import make_tokenizer
from errors import UserError
from experiment.schema import Config
from experiment.workdir import recorded_config
from model.config import ModelConfig
from model.sharding import batch_shards, make_mesh, mesh_axes
from rl.config import ReinforceConfig
from train.progress import timed_line
from train.restore import load_variables
from train.setup import Setup
from train.state import count_parameters


def set_up(
    config: Config,
    workdir: Path,
    rows: Mapping[str, int],
    *,
    trains: bool,
    devices: list | None = None,
) -> Setup:
    """Makes the mesh, finds or trains the tokenizer, and prints what is about to run.

    Args:
      rows: numbers of rows that must divide over the devices, by what they are a number of.
      trains: whether the run trains, so that the summary names data and schedule.
      devices: of the mesh; None for all.

    Raises:
      UserError: the rows do not divide, or there is no such tokenizer or checkpoint.
    """
    compile_cache()
    mesh = make_mesh(config.mesh, devices)
    for what, count in rows.items():
        if count % batch_shards(mesh):
            raise UserError(
                f"{what} = {count}: {count} rows at a time do not divide over "
                f"{batch_shards(mesh)} devices (mesh axes {' x '.join(mesh_axes('batch'))}); "
                "change that or the mesh"
            )
    if config.tasks:
        register_tasks(config.tasks)
    tokenizer = workdir_tokenizer(config, workdir)
    tokenizer = tokenizer.with_template_options(config.data.template_options or {})
    if config.init_from and jax.process_index() == 0:
        inherit_record(config.init_from, workdir)
    model = with_vocab_size(config.model, tokenizer)
    characters = spelled_out(config.data.chat_template, tokenizer)
    if characters and jax.process_index() == 0:
        tags = ", ".join(characters)
        print(f'data.chat_template = "r1": {tags} are characters in this tokenizer', flush=True)
    print_summary(config, *count_parameters(model), mesh, trains=trains)
    return Setup(model, tokenizer, mesh)


def split_devices(config: ReinforceConfig) -> tuple[list, list]:
    """Returns the devices that learn, and those that sample: all of them both, or some apart.

    Raises UserError where none would be left to learn, or there are several processes.
    """
    devices, apart = jax.devices(), config.sampler_devices
    if not apart:
        return devices, devices
    if jax.process_count() > 1:
        raise UserError(
            f"reinforce.sampler_devices = {apart}: not with {jax.process_count()} processes, whose "
            "threads may meet in another order; use 0, where all devices take turns"
        )
    if apart >= len(devices):
        raise UserError(
            f"reinforce.sampler_devices = {apart}: leaves none of {len(devices)} device(s) to "
            f"learn (for a dry run: --pretend_devices={2 * apart})"
        )
    return devices[:-apart], devices[-apart:]


def sampler_setup(setup: Setup, config: ReinforceConfig, devices: list) -> Setup:
    """Returns what samples for a run: on devices of its own, or the run's setup itself.

    Raises UserError where `reinforce.sampler_mesh` does not fit the devices.
    """
    if not config.sampler_devices:
        return setup
    try:
        mesh = make_mesh(config.sampler_mesh, devices)
    except UserError as failure:
        raise UserError(f"reinforce.sampler_{failure}") from failure
    if jax.process_index() == 0:
        print(f"{'sampler':<12}{_mesh_line(mesh)}", flush=True)
    return dataclasses.replace(setup, mesh=mesh)


def compile_cache() -> None:
    """Keeps compiled programs between runs.

    They are in .jax_cache beside the code, or in the directory that
    JAX_COMPILATION_CACHE_DIR names.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        directory = Path(__file__).parents[1] / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def with_vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the model with the tokenizer's vocabulary, unless the config names a larger one.

    Raises UserError if the config names a smaller one.
    """
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} "
            f"entries; give --config.model.vocab_size={tokenizer.vocab_size} (rows that hf:DIR "
            "lacks are then the mean of the others)"
        )
    return model


def workdir_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """Returns the tokenizer of a run, which its workdir keeps from then on.

    That is the workdir's own; else that of the run or checkpoint that the parameters come from;
    else a new one.
    """
    own = workdir / "tokenizer.json"
    if own.exists():
        return load_tokenizer(own)
    inherited = _inherited_tokenizer(config.init_from)
    if inherited is not None:
        tokenizer = load_tokenizer(inherited)
    elif config.tokenizer.kind == "bpe":
        with timed_line("training the tokenizer"):
            tokenizer = make_tokenizer(config.tokenizer, config.data)
    else:
        tokenizer = make_tokenizer(config.tokenizer, config.data)
    if jax.process_index() == 0:
        tokenizer.save(own)
    return tokenizer


def _inherited_tokenizer(init_from: str) -> Path | None:
    """Returns the tokenizer file that comes with `init_from`, if one does."""
    if not init_from:
        return None
    directory = hf_directory(init_from)
    if directory is not None:
        # It must be there: a new tokenizer would not be what the checkpoint's model was trained on.
        return directory / "tokenizer.json"
    theirs = run_directory(init_from) / "tokenizer.json"
    return theirs if theirs.exists() else None


def run_variables(setup: Setup, init_from: str, workdir: Path) -> dict:
    """Reads {"params", "router"} of a run's newest checkpoint.

    Where the workdir has no checkpoints, being a place for results alone, those of `init_from` are
    read.

    Raises:
      UserError: the workdir has checkpoints, and `init_from` is not where that run started from.
    """
    if not (workdir / "checkpoints").exists():
        return load_variables(setup.model, setup.mesh, init_from or workdir)
    if init_from != recorded_config(workdir).init_from:
        raise UserError(
            f"init_from = {init_from!r}: {workdir} has checkpoints of its own; "
            f"to read {init_from!r} give another --workdir"
        )
    return load_variables(setup.model, setup.mesh, workdir)


def print_summary(
    config: Config, parameters_total: int, parameters_active: int, mesh: Mesh, *, trains: bool
) -> None:
    """Prints what is about to run, in a few lines. On several hosts process 0 alone prints.

    Args:
      parameters_active: those that one token goes through.
      trains: whether data and schedule are named too.
    """
    if jax.process_index() != 0:
        return
    parameters = f"{parameters_total:,} total, {parameters_active:,} active"
    rows = {
        "model": _model_line(config.model),
        "parameters": parameters,
        "mesh": _mesh_line(mesh),
    } | (_training_lines(config) if trains else {})
    console = Console(highlight=False)
    if not console.is_terminal:
        for name, value in rows.items():
            print(f"{name:<12}{value}", flush=True)
        return
    table = Table(show_header=False, title="config", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _model_line(model: ModelConfig) -> str:
    """Describes a model in one line: its layers, its width and its experts."""
    moe = model.moe
    routed = "no experts"
    if model.moe_layers:
        shared = f"{moe.num_experts_per_tok} chosen + {moe.n_shared_experts} shared"
        routed = f"{moe.num_experts} experts, {shared}"
    attention = ", ".join(
        f"{sum(kind.attention == name for kind in model.kinds)} {name}"
        for name in dict.fromkeys(kind.attention for kind in model.kinds)
    )
    dense = model.num_hidden_layers - model.moe_layers
    layers = f"{model.num_hidden_layers} layers ({attention}; {dense} dense)"
    return f"{layers} x {model.hidden_size} wide, {routed}"


def _mesh_line(mesh: Mesh) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    count = mesh.devices.size
    return f"{axes}: {count} {mesh.devices.flat[0].platform} device{'s' * (count > 1)}"


def _training_lines(config: Config) -> dict[str, str]:
    """Describes the data and the training of a config, a line each."""
    data, train = config.data, config.train
    tokens = (
        f"{data.batch_size} x {data.seq_len} = {data.batch_size * data.seq_len:,} tokens a step"
    )
    schedule = f"{train.steps:,} steps, learning rate {train.learning_rate:g}"
    return {
        # A glob may have bytes that UTF-8 cannot write.
        "data": f"{', '.join(data.sources)}; {tokens}".encode(errors="backslashreplace").decode(),
        "train": f"{train.stage}, {schedule}, seed {config.seed}",
        "export": _export_line(config.model),
    }


def _export_line(model: ModelConfig) -> str:
    """Says whether launch.convert can write the model for Hugging Face, and if not, why."""
    refused = export_refusals(model)
    if not refused:
        return "launch.convert can write it for Hugging Face"
    return f"not for Hugging Face: {'; '.join(refused)}"
