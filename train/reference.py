"""The model that a run is compared with, which is most often the one that it started from.

The workdir keeps its parameters in `reference/` and where they come from in `reference.json`, so
that a run that goes on compares with the same ones, to the bit, whatever became of the run or the
file that they were read from. Where adapters learn (train.lora), it is their base: the same arrays,
in memory and on disk.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from checkpoints.cursors import Cursor
from checkpoints.locations import REFERENCE_RECORD, run_directory
from checkpoints.lora import BASE, recorded_lora
from checkpoints.training import Checkpoints
from errors import UserError
from files import read_json, write_json
from train.base import Origin
from train.restore import Branch, load_variables, restored_or_new, starting_point
from train.setup import Setup
from train.state import StateOverBase, TrainState, abstract_state, state_from

DIRECTORY = "reference"


def begun(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    cursor: Cursor,
    *,
    needs_reference: bool,
    init_from: str,
    seed: int,
    branch: Branch | None,
) -> tuple[TrainState, dict | None]:
    """Returns the state that a run goes on from, and the model {"params", "router"} it began as.

    A run with a checkpoint moves the cursor to the place in it. One without starts from its
    reference, and one that is new makes it first.

    Args:
      needs_reference: without it the second is None.
      branch: as of `restored_or_new`; None with a reference.

    Raises UserError if a checkpoint does not fit the model, or the reference is gone.
    """
    resumes = checkpoints.latest() is not None

    def restored() -> TrainState:
        return restored_or_new(
            setup, optimizer, checkpoints, cursor, init_from=init_from, seed=seed, branch=branch
        )

    if not needs_reference:
        return restored(), None
    if setup.lora is not None:
        state = restored()
        assert isinstance(state, StateOverBase)
        return state, state.base
    with Checkpoints(checkpoints.directory.parent / DIRECTORY, keep=1) as kept:
        number = keep_reference(setup, kept, init_from, seed, resumes=resumes)
        if resumes:
            state = restored()
        else:
            variables = restored_reference(setup, kept, number)
            state = state_from(variables, setup.model, optimizer, setup.mesh)
        return state, restored_reference(setup, kept, number)


def recorded_reference(setup: Setup, path: str | Path) -> dict | None:
    """Reads the reference of a run onto the mesh, from its workdir; None if it keeps none.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
    """
    workdir = run_directory(path)
    if recorded_lora(workdir) is not None:
        return load_variables(setup.model, setup.mesh, workdir / BASE)
    record = workdir / REFERENCE_RECORD
    if not record.exists():
        return None
    with Checkpoints(workdir / DIRECTORY, keep=1) as kept:
        return restored_reference(setup, kept, int(read_json(record)["step"]))


def keep_reference(
    setup: Setup, kept: Checkpoints, source: str, seed: int, *, resumes: bool
) -> int:
    """Makes sure that a run has its first reference; returns the number it is, or was, kept under.

    Args:
      kept: `reference/` of the workdir.
      source: where a new run's reference comes from; "" draws it from `seed`.
      resumes: whether the run has a checkpoint, so that it should have a reference.

    Raises UserError if the reference of a run that goes on is gone.
    """
    workdir = kept.directory.parent
    record = workdir / REFERENCE_RECORD
    if not resumes and not record.exists():
        kept.delete_after(-1)  # of a run that died before it was recorded
    if kept.latest() is None and resumes:
        _keep_of_older_run(setup, kept, workdir, source, seed)
    elif kept.latest() is None:
        _keep(kept, workdir, *starting_point(setup, source, seed))
    if record.exists():
        return int(read_json(record)["step"])
    return kept.latest() or 0


def restored_reference(setup: Setup, kept: Checkpoints, number: int) -> dict:
    """Reads a reference onto the mesh."""
    abstract = abstract_state(setup.model, optax.identity(), setup.mesh)
    wanted = {"params": abstract.params, "router": abstract.router}
    return kept.restore(wanted, step=number)


def _keep(kept: Checkpoints, workdir: Path, origin: Origin, variables: dict) -> None:
    """Writes where the reference comes from, and then the reference."""
    if jax.process_index() == 0:
        write_json(workdir / REFERENCE_RECORD, {"source": origin.path, "step": origin.step})
    kept.save(origin.step, jax.tree.map(jnp.copy, variables))
    kept.wait()


def _keep_of_older_run(
    setup: Setup, kept: Checkpoints, workdir: Path, source: str, seed: int
) -> None:
    """Makes the reference of a run that began without keeping one.

    Of parameters drawn from a seed it is what it was. Of another run it is the newest checkpoint of
    that, which may have gone on since: a line says so.

    Raises UserError if the run did keep one, and it is gone.
    """
    if (workdir / REFERENCE_RECORD).exists():
        raise UserError(
            f"{kept.directory}: the parameters of the reference are gone, which this run is "
            "compared with; restore the directory, or begin in another --workdir"
        )
    origin, variables = starting_point(setup, source, seed)
    if origin.path and jax.process_index() == 0:
        print(f"reference   none kept when this run began; from now on {origin.path}", flush=True)
    _keep(kept, workdir, origin, variables)
