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
from checkpoints.locations import hf_directory, run_directory
from checkpoints.lora import BASE, recorded_lora
from checkpoints.restore import open_checkpoint, restore_parameters, restore_state
from checkpoints.training import Checkpoints
from errors import UserError
from model.config import ModelConfig
from train.base import Origin, abstract_learnt, first_adapters, kept_base, merged_variables
from train.lora import Lora
from train.progress import Progress, timed_line
from train.setup import Setup
from train.state import StateOverBase, TrainState, abstract_state, fresh_state, state_from

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
    parameters drawn from `seed`. With adapters these are the base's (`over_base`).

    Raises:
      UserError: a checkpoint does not fit the model or the optimizer, or is not there, or the run
        that is branched off has done all steps.
    """
    if setup.lora is not None:
        return over_base(setup, setup.lora, optimizer, checkpoints, cursor, init_from, seed, branch)
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract_state(setup.model, optimizer, setup.mesh), cursor)
    if branch:
        if recorded_lora(init_from) is not None:
            raise UserError(
                f"init_state = 'all': {init_from} learnt by adapters; give train.lora as it has, "
                "or init_state = 'parameters', which starts from their sum"
            )
        return branched(
            init_from, abstract_state(setup.model, optimizer, setup.mesh), cursor, branch
        )
    if init_from:
        variables = load_variables(setup.model, setup.mesh, init_from)
        return state_from(variables, setup.model, optimizer, setup.mesh)
    return fresh_state(setup.model, optimizer, setup.mesh, jax.random.key(seed))


def over_base(
    setup: Setup,
    lora: Lora,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    cursor: Cursor | None,
    init_from: str,
    seed: int,
    branch: Branch | None,
) -> StateOverBase:
    """Returns the state of a run with adapters, as `restored_or_new` does.

    The base is what the workdir keeps of it, or else the newest of `init_from`; of a branch, the
    base of that run.

    Raises UserError as `restored_or_new` does, and where a branch is off a run of other adapters.
    """
    workdir, resumes = checkpoints.directory.parent, checkpoints.latest() is not None

    def make() -> tuple[Origin, dict]:
        if branch:
            record = recorded_lora(init_from)
            if record is None or Lora(record.rank, record.scale, record.matrices) != lora:
                raise UserError(
                    f"init_state = 'all': {init_from} has no adapters of this rank, scale and "
                    "matrices, so no optimizer's state of them; use init_state = 'parameters'"
                )
            kept = run_directory(init_from) / BASE
            origin = Origin(record.source, record.step)
            return origin, load_variables(setup.model, setup.mesh, kept)
        return starting_point(setup, init_from, seed)

    base = kept_base(setup, lora, workdir, make, resumes=resumes)
    abstract = abstract_learnt(setup.model, lora, optimizer, setup.mesh)
    if resumes:
        learnt = checkpoints.restore(abstract, cursor)
    elif branch:
        learnt = branched(init_from, abstract, cursor, branch)
    else:
        variables = first_adapters(setup, lora, base, seed)
        boxed = lora.boxes(setup.model)
        learnt = state_from(variables, setup.model, optimizer, setup.mesh, boxed)
        _say_what_learns(learnt.params, base["params"])
    return StateOverBase.of(learnt, base, lora.scale)


def _say_what_learns(adapters: dict, params: dict) -> None:
    if jax.process_index() == 0:
        learn, of = (
            sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapters, params)
        )
        print(f"{'adapters':<12}{learn:,} parameters learn, beside {of:,} that do not", flush=True)


def starting_point(setup: Setup, init_from: str, seed: int) -> tuple[Origin, dict]:
    """Returns where a new run's parameters come from, and its {"params", "router"}.

    They are the newest of `init_from` at this moment, or drawn from `seed` where that is "".

    Raises:
      UserError: there is no checkpoint, or it does not fit the model.
    """
    origin = origin_of(init_from)
    if origin.path:
        return origin, load_variables(setup.model, setup.mesh, origin.path)
    key = jax.random.key(seed)
    return origin, fresh_state(setup.model, optax.identity(), setup.mesh, key).variables


def origin_of(init_from: str) -> Origin:
    """Returns the checkpoint that is the newest of `init_from` at this moment.

    Raises UserError if there is none.
    """
    if not init_from or hf_directory(init_from):
        return Origin(init_from, 0)
    with open_checkpoint(Path(init_from)) as (_, directory, step):
        return Origin(str(directory / str(step)), step)


def branched(
    init_from: str, abstract: TrainState, cursor: Cursor | None, branch: Branch
) -> TrainState:
    """Returns the whole state of another run, and moves the cursor where the data are the same.

    Raises:
      UserError: it does not fit, or that run has done all steps.
    """
    state = restore_all(Path(init_from), abstract, cursor if branch.same_data else None)
    if int(state.step) >= branch.steps:
        raise UserError(
            f"train.steps = {branch.steps}: init_from = {init_from!r} has done {state.step} "
            "steps, from which this run counts on; set more"
        )
    return state


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
    """Reads {"params", "router"} from disk onto a mesh, adapters added to what they adapt.

    Args:
      path: a run's working directory, of which the newest checkpoint counts, or `hf:DIR`, a Hugging
        Face checkpoint.

    Raises:
      UserError: there is no checkpoint, or it does not fit the model.
    """
    record = None if hf_directory(path) else recorded_lora(path)
    if record is not None:
        return merged_variables(model, mesh, path, record)
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
