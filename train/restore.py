"""Restores or makes the parameters of a run.

They come from its own newest checkpoint, another run, a Hugging Face checkpoint, or a random key.
"""

import itertools
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from checkpoints.cursors import Cursor
from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.load import load_checkpoint
from checkpoints.locations import hf_directory
from checkpoints.restore import restore_parameters
from checkpoints.training import Checkpoints
from model.config import ModelConfig
from train.progress import Progress
from train.setup import Setup
from train.state import TrainState, abstract_state, fresh_state, state_from

# Loading a checkpoint of at least this many parameters shows its progress: fewer take a moment.
PARAMETERS_WORTH_A_BAR = 2**28


def restored_or_new(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    cursor: Cursor | None = None,
    *,
    init_from: str,
    seed: int,
) -> TrainState:
    """Returns the state a run goes on from, and moves `cursor` with it.

    That is the run's newest checkpoint; where it has none, a new state with the parameters of
    `init_from`; where that is "", a new state with parameters drawn from `seed`.

    Raises:
      UserError: a checkpoint does not fit the model, or is not there.
    """
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract_state(setup.model, optimizer, setup.mesh), cursor)
    if init_from:
        variables = load_variables(setup.model, setup.mesh, init_from)
        return state_from(variables, setup.model, optimizer, setup.mesh)
    return fresh_state(setup.model, optimizer, setup.mesh, jax.random.key(seed))


def load_variables(model: ModelConfig, mesh: Mesh, path: str | Path) -> dict:
    """Reads {"params", "router"} from disk onto a mesh.

    Args:
      path: a run's working directory, of which the newest checkpoint counts, or `hf:DIR`, a Hugging
        Face checkpoint.

    Raises:
      UserError: there is no checkpoint, or it does not fit the model.
    """
    abstract = abstract_state(model, optax.identity(), mesh)
    wanted = {"params": abstract.params, "router": abstract.router}
    directory = hf_directory(path)
    if directory is None:
        return restore_parameters(Path(path), wanted)
    checkpoint = HFCheckpoint(directory, model)
    leaves = jax.tree.leaves(wanted)
    if sum(leaf.size for leaf in leaves) < PARAMETERS_WORTH_A_BAR:
        return load_checkpoint(checkpoint, wanted)
    count = itertools.count(1)
    with Progress(len(leaves), f"loading {path}", unit="parameters") as progress:
        return load_checkpoint(
            checkpoint, wanted, lambda elements: progress.update(next(count), {}, elements)
        )
