"""How every run begins: the mesh, the tokenizer, the model's config, the state, fresh or
restored.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from checkpoints.hf.load import HFCheckpoint, load_checkpoint
from checkpoints.hf.metadata import inherit_record
from checkpoints.locations import hf_directory, run_directory
from checkpoints.training import Checkpoints, restore_parameters
from data.pipeline import make_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from errors import UserError
from experiment.schema import Config
from experiment.workdir import recorded_config
from model.config import ModelConfig
from model.sharding import batch_sharding, batch_shards, make_mesh
from train.progress import Progress
from train.state import TrainState, abstract_state, count_parameters, fresh_state, state_from

SHOWN = 2**28  # parameters; loading fewer takes a moment


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not change during a run."""

    config: Config
    model: ModelConfig  # config.model with the vocabulary filled in
    tokenizer: Tokenizer
    mesh: Mesh

    def on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's rows as part of the global batch."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def set_up(config: Config, workdir: Path, rows: int, *, trains: bool) -> Setup:
    """Makes the mesh, finds or trains the tokenizer, and says what is about to run. `rows` is how
    many rows a microbatch has.
    """
    compile_cache()
    mesh = make_mesh(config.mesh)
    if rows % batch_shards(mesh):
        devices = f"{batch_shards(mesh)} devices (mesh axes data x fsdp x expert)"
        raise UserError(
            f"{rows} rows at a time do not divide over {devices}; change the mesh, data.batch_size, train.microbatches or reinforce.prompts_per_step"
        )
    tokenizer = workdir_tokenizer(config, workdir)
    if config.init_from and jax.process_index() == 0:
        inherit_record(config.init_from, workdir)
    model = with_vocab_size(config.model, tokenizer)
    print_summary(config, *count_parameters(model), mesh, trains=trains)
    return Setup(config, model, tokenizer, mesh)


def to_host(x: Array) -> np.ndarray:
    """All of an array, on every host, however it is spread over them. To be called by all processes
    alike.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def compile_cache() -> None:
    """Compiled programs are kept between runs, in .jax_cache here or where
    JAX_COMPILATION_CACHE_DIR says.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache")
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def with_vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """With the tokenizer's vocabulary, unless the config names a larger one."""
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} entries; set at least that, or 0"
        )
    return model


def workdir_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The workdir's own; else that of the run the parameters come from; else a new one. It is kept
    in the workdir from then on.
    """
    own = workdir / "tokenizer.json"
    if own.exists():
        return load_tokenizer(own)
    directory = hf_directory(config.init_from)
    theirs = (
        (directory or run_directory(config.init_from)) / "tokenizer.json"
        if config.init_from
        else None
    )
    # A checkpoint's must be there: a new one would not be what its model was trained on.
    tokenizer = (
        load_tokenizer(theirs)
        if directory or (theirs and theirs.exists())
        else make_tokenizer(config.tokenizer, config.data)
    )
    if jax.process_index() == 0:
        tokenizer.save(own)
    return tokenizer


def fresh_or_restored(
    begin: Setup, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, cursor=None
) -> TrainState:
    """The newest checkpoint of this run, its cursor moved with it; else new, with the parameters of
    `init_from` if there is one.
    """
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract_state(begin.model, optimizer, begin.mesh), cursor)
    if begin.config.init_from:
        return state_from(
            load_variables(begin.model, begin.mesh, begin.config.init_from),
            begin.model,
            optimizer,
            begin.mesh,
        )
    return fresh_state(begin.model, optimizer, begin.mesh, jax.random.key(begin.config.seed))


def run_variables(begin: Setup, workdir: Path) -> dict:
    """What to read a run's model from: its own newest checkpoint; `init_from` where the workdir has
    none, being a place for results alone.

    Raises UserError when the workdir has checkpoints and the config names others than the run
    itself started from.
    """
    named = begin.config.init_from
    if not (workdir / "checkpoints").exists():
        return load_variables(begin.model, begin.mesh, named or workdir)
    if named != recorded_config(workdir).init_from:
        raise UserError(
            f"init_from = {named!r}: {workdir} has checkpoints of its own; to read {named!r} give another --workdir"
        )
    return load_variables(begin.model, begin.mesh, workdir)


def load_variables(model: ModelConfig, mesh: Mesh, path: str | Path) -> dict:
    """{"params", "router"} of the newest checkpoint of a run, or of a Hugging Face checkpoint, on
    this mesh.
    """
    abstract = abstract_state(model, optax.identity(), mesh)
    wanted = {"params": abstract.params, "router": abstract.router}
    directory = hf_directory(path)
    if directory is None:
        return restore_parameters(Path(path), wanted)
    leaves, read = jax.tree.leaves(wanted), itertools.count(1)
    if sum(leaf.size for leaf in leaves) < SHOWN:
        return load_checkpoint(HFCheckpoint(directory, model), wanted)
    with Progress(len(leaves), f"loading {path}", unit="parameters") as progress:
        return load_checkpoint(
            HFCheckpoint(directory, model),
            wanted,
            lambda elements: progress.update(next(read), {}, elements),
        )


def print_summary(
    config: Config, parameters_total: int, parameters_active: int, mesh: Mesh, *, trains: bool
) -> None:
    """Prints what is about to run, in a few lines, once per run: process 0 alone speaks.
    `parameters_active` counts what one token goes through.
    """
    import jax
    from rich.console import Console
    from rich.table import Table

    if jax.process_index() != 0:
        return
    model, data, train = config.model, config.data, config.train
    routed = (
        f"{model.moe.num_experts} experts, {model.moe.num_experts_per_tok} chosen + {model.moe.n_shared_experts} shared"
        if model.moe_layers
        else "no experts"
    )
    attention = ", ".join(
        f"{sum(kind.attention == name for kind in model.kinds)} {name}"
        for name in dict.fromkeys(kind.attention for kind in model.kinds)
    )
    devices = mesh.devices.size
    rows = {
        "model": f"{model.num_hidden_layers} layers ({attention}; {model.num_hidden_layers - model.moe_layers} dense) x {model.hidden_size} wide, {routed}",
        "parameters": f"{parameters_total:,} total, {parameters_active:,} active",
        "mesh": f"{' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}: {devices} {mesh.devices.flat[0].platform} device{'s' * (devices > 1)}",
    }
    if trains:
        rows["data"] = (
            f"{', '.join(data.sources)}; {data.batch_size} x {data.seq_len} = {data.batch_size * data.seq_len:,} tokens a step"
        )
        rows["train"] = (
            f"{train.stage}, {train.steps:,} steps, learning rate {train.learning_rate:g}, seed {config.seed}"
        )
    console = Console(highlight=False)
    table = (
        Table(show_header=False, title="config", title_justify="left")
        if console.is_terminal
        else None
    )
    for name, value in rows.items():
        if table is None:
            print(f"{name:<12}{value}", flush=True)
        else:
            table.add_row(name, value)
    if table is not None:
        console.print(table)
