"""Restores or makes the parameters of a run.

They come from its own newest checkpoint, another run, a Hugging Face checkpoint, or a random key.
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from checkpoints.cursors import Cursor, restore_cursor
from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.load import load_checkpoint
from checkpoints.locations import hf_directory
from checkpoints.restore import open_checkpoint, restore_parameters, restore_state
from checkpoints.training import Checkpoints
from errors import UserError
from model.config import ModelConfig
from train.progress import Progress, timed_line
from train.setup import Setup
from train.state import TrainState, abstract_state, fresh_state, state_from

# Loading a checkpoint of at least this many parameters shows its progress: fewer take a moment.
PARAMETERS_WORTH_A_BAR = 2**28


@dataclasses.dataclass(frozen=True)
class Branch:
    """A run that goes on from another's whole state: parameters, optimizer and step.

    Attributes:
      steps: the step to end at.
      same_data: whether its place in the data counts too.
    """

    steps: int
    same_data: bool


def restored_or_new(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    cursor: Cursor | None = None,
    *,
    init_from: str,
    seed: int,
    branch: Branch | None = None,
) -> TrainState:
    """Returns the state a run goes on from, and moves `cursor` with it.

    That is the run's newest checkpoint; where it has none, the whole state of `init_from` if there
    is a `branch`, else a new state with its parameters; where that is "", a new state with
    parameters drawn from `seed`.

    Raises:
      UserError: a checkpoint does not fit the model or the optimizer, or is not there, or the run
        that is branched off has done all steps.
    """
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract_state(setup.model, optimizer, setup.mesh), cursor)
    if branch:
        abstract = abstract_state(setup.model, optimizer, setup.mesh)
        state = restore_all(Path(init_from), abstract, cursor if branch.same_data else None)
        if int(state.step) >= branch.steps:
            raise UserError(
                f"train.steps = {branch.steps}: init_from = {init_from!r} has done {state.step} "
                "steps, from which this run counts on; set more"
            )
        return state
    if init_from:
        variables = load_variables(setup.model, setup.mesh, init_from)
        return state_from(variables, setup.model, optimizer, setup.mesh)
    return fresh_state(setup.model, optimizer, setup.mesh, jax.random.key(seed))


def restore_all(path: Path, abstract: TrainState, cursor: Cursor | None = None) -> TrainState:
    """Reads the whole state of another run's newest whole checkpoint, and moves `cursor` with it.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      abstract: the state as `abstract_state` lays it out.
      cursor: the data iterator to move.

    Raises:
      UserError: no checkpoint there, or one that does not fit.
    """
    with open_checkpoint(path) as (manager, directory, step):
        state = restore_state(manager, directory, step, abstract)
        if cursor is not None:
            restore_cursor(manager, directory / str(step), cursor)
    return state


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
    directory, leaves = hf_directory(path), jax.tree.leaves(wanted)
    takes_long = sum(leaf.size for leaf in leaves) >= PARAMETERS_WORTH_A_BAR
    if directory is None:
        with timed_line(f"loading {path}") if takes_long else contextlib.nullcontext():
            return restore_parameters(Path(path), wanted)
    checkpoint = HFCheckpoint(directory, model)
    if not takes_long:
        return load_checkpoint(checkpoint, wanted)
    count = itertools.count(1)
    with Progress(len(leaves), f"loading {path}", unit="parameters") as progress:
        return load_checkpoint(
            checkpoint, wanted, lambda elements: progress.update(next(count), {}, elements)
        )
