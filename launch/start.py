"""How every run begins: the mesh, the tokenizer, the model's config, the state, fresh or restored."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data.pipeline import make_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from errors import UserError
from launch.door import Config, recorded, summarise
from launch.hf_record import inherit_record
from launch.origin import hf_directory, run_directory
from model.config import ModelConfig
from model.hf.load import Checkpoint, load
from model.sharding import batch_sharding, batch_shards, make_mesh
from train.checkpoint import Checkpoints, restore_parameters
from train.progress import Progress
from train.state import TrainState, abstract_state, count_parameters, fresh_state, state_from

SHOWN = 2**28  # parameters; loading fewer takes a moment


@dataclasses.dataclass(frozen=True)
class Start:
    """What does not change during a run."""

    config: Config
    model: ModelConfig  # config.model with the vocabulary filled in
    tokenizer: Tokenizer
    mesh: Mesh

    def on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's rows as part of the global batch."""
        sharding = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def start(config: Config, workdir: Path, rows: int, *, trains: bool) -> Start:
    """Makes the mesh, finds or trains the tokenizer, and says what is about to run. `rows` is how many rows a microbatch has."""
    compile_cache()
    mesh = make_mesh(config.mesh)
    if rows % batch_shards(mesh):
        devices = f"{batch_shards(mesh)} devices (mesh axes data x fsdp x expert)"
        raise UserError(f"{rows} rows at a time do not divide over {devices}; change the mesh, data.batch, train.microbatches or reinforce.prompts")
    tokenizer = workdir_tokenizer(config, workdir)
    if config.init_from and jax.process_index() == 0:
        inherit_record(config.init_from, workdir)
    model = sized(config.model, tokenizer)
    summarise(config, *count_parameters(model), mesh, trains=trains)
    return Start(config, model, tokenizer, mesh)


def on_host(x: Array) -> np.ndarray:
    """All of an array, on every host, however it is spread over them. To be called by all processes alike."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def compile_cache() -> None:
    """Compiled programs are kept between runs, in .jax_cache here or where JAX_COMPILATION_CACHE_DIR says."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def sized(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """With the tokenizer's vocabulary, unless the config names a larger one."""
    if model.vocab == 0:
        return dataclasses.replace(model, vocab=tokenizer.vocab)
    if model.vocab < tokenizer.vocab:
        raise UserError(f"model.vocab = {model.vocab}: the tokenizer has {tokenizer.vocab} entries; set at least that, or 0")
    return model


def workdir_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The workdir's own; else that of the run the parameters come from; else a new one. It is kept in the workdir from then on."""
    own = workdir / "tokenizer.json"
    if own.exists():
        return load_tokenizer(own)
    directory = hf_directory(config.init_from)
    theirs = (directory or run_directory(config.init_from)) / "tokenizer.json" if config.init_from else None
    # A checkpoint's must be there: a new one would not be what its model was trained on.
    tokenizer = load_tokenizer(theirs) if directory or (theirs and theirs.exists()) else make_tokenizer(config.tokenizer, config.data)
    if jax.process_index() == 0:
        tokenizer.save(own)
    return tokenizer


def fresh_or_restored(begin: Start, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, cursor=None) -> TrainState:
    """The newest checkpoint of this run, its cursor moved with it; else new, with the parameters of `init_from` if there is one."""
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract_state(begin.model, optimizer, begin.mesh), cursor)
    if begin.config.init_from:
        return state_from(load_variables(begin.model, begin.mesh, begin.config.init_from), begin.model, optimizer, begin.mesh)
    return fresh_state(begin.model, optimizer, begin.mesh, jax.random.key(begin.config.seed))


def run_variables(begin: Start, workdir: Path) -> dict:
    """What to read a run's model from: its own newest checkpoint; `init_from` where the workdir has none, being a place for results alone.

    Raises UserError when the workdir has checkpoints and the config names others than the run itself started from.
    """
    named = begin.config.init_from
    if not (workdir / "checkpoints").exists():
        return load_variables(begin.model, begin.mesh, named or workdir)
    if named != recorded(workdir).init_from:
        raise UserError(f"init_from = {named!r}: {workdir} has checkpoints of its own; to read {named!r} give another --workdir")
    return load_variables(begin.model, begin.mesh, workdir)


def load_variables(model: ModelConfig, mesh: Mesh, path: str | Path) -> dict:
    """{"params", "router"} of the newest checkpoint of a run, or of a Hugging Face checkpoint, on this mesh."""
    abstract = abstract_state(model, optax.identity(), mesh)
    wanted = {"params": abstract.params, "router": abstract.router}
    directory = hf_directory(path)
    if directory is None:
        return restore_parameters(Path(path), wanted)
    leaves, read = jax.tree.leaves(wanted), itertools.count(1)
    if sum(leaf.size for leaf in leaves) < SHOWN:
        return load(Checkpoint(directory, model), wanted)
    with Progress(len(leaves), f"loading {path}", unit="parameters") as progress:
        return load(Checkpoint(directory, model), wanted, lambda elements: progress.update(next(read), {}, elements))
