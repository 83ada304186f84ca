"""The reference that a divergence compares the policy with: fixed at the first start of a run.

It is the model that reinforcement started from. The workdir keeps its parameters in `reference/`
and where they come from in `reference.json`, so that a run that goes on compares with the same
ones, to the bit, whatever became of the run or the file that they were read from.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from checkpoints.cursors import Cursor
from checkpoints.locations import hf_directory
from checkpoints.restore import open_checkpoint
from checkpoints.training import Checkpoints
from errors import UserError
from files import write_json
from train.restore import load_variables, restored_or_new
from train.setup import Setup
from train.state import TrainState, abstract_state, fresh_state, state_from


class Origin(NamedTuple):
    """Where parameters come from.

    Attributes:
      path: a checkpoint of a run, or `hf:DIR`; "" for parameters drawn from the run's seed.
      step: of the run that the checkpoint is of, else 0.
    """

    path: str
    step: int


def start_with_reference(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    workdir: Path,
    cursor: Cursor | None = None,
    *,
    init_from: str,
    seed: int,
) -> tuple[TrainState, dict]:
    """Returns the state that a run goes on from, and the variables of its reference.

    A run with a checkpoint moves the cursor to the place in it. One without starts from its
    reference, and one that is new makes it first.

    Raises:
      UserError: a checkpoint does not fit the model, or the reference is gone.
    """
    with Checkpoints(workdir / "reference", keep=1) as kept:
        if checkpoints.latest() is not None:
            state = restored_or_new(setup, optimizer, checkpoints, cursor, init_from="", seed=seed)
            if kept.latest() is None:
                _keep_of_older_run(setup, kept, workdir, init_from, seed)
            return state, _restored(setup, kept)
        if kept.latest() is None:
            origin = origin_of(init_from)
            _keep(kept, workdir, origin, _first_variables(setup, origin.path, seed))
        state = state_from(_restored(setup, kept), setup.model, optimizer, setup.mesh)
        return state, _restored(setup, kept)


def origin_of(init_from: str) -> Origin:
    """Returns the checkpoint that is the newest of `init_from` at this moment.

    Raises UserError if there is none.
    """
    if not init_from or hf_directory(init_from):
        return Origin(init_from, 0)
    with open_checkpoint(Path(init_from)) as (_, directory, step):
        return Origin(str(directory / str(step)), step)


def _first_variables(setup: Setup, path: str, seed: int) -> dict:
    """Returns the variables that a run without a checkpoint starts from."""
    if path:
        return load_variables(setup.model, setup.mesh, path)
    key = jax.random.key(seed)
    return fresh_state(setup.model, optax.identity(), setup.mesh, key).variables


def _keep(kept: Checkpoints, workdir: Path, origin: Origin, variables: dict) -> None:
    """Writes where the reference comes from, and then the reference."""
    if jax.process_index() == 0:
        write_json(workdir / "reference.json", {"source": origin.path, "step": origin.step})
    kept.save(origin.step, jax.tree.map(jnp.copy, variables))
    kept.wait()


def _keep_of_older_run(
    setup: Setup, kept: Checkpoints, workdir: Path, init_from: str, seed: int
) -> None:
    """Makes the reference of a run that began without keeping one.

    Of parameters drawn from a seed it is what it was. Of another run it is the newest checkpoint of
    that, which may have gone on since: a line says so.

    Raises UserError if the run did keep one, and it is gone.
    """
    if (workdir / "reference.json").exists():
        raise UserError(
            f"{kept.directory}: the parameters of the reference are gone, which the divergence of "
            "this run is measured from; restore the directory, or begin in another --workdir"
        )
    origin = origin_of(init_from)
    if origin.path and jax.process_index() == 0:
        print(f"reference   none kept when this run began; from now on {origin.path}", flush=True)
    _keep(kept, workdir, origin, _first_variables(setup, origin.path, seed))


def _restored(setup: Setup, kept: Checkpoints) -> dict:
    """Reads the reference onto the mesh."""
    abstract = abstract_state(setup.model, optax.identity(), setup.mesh)
    return kept.restore({"params": abstract.params, "router": abstract.router})
