"""The base of a run with adapters: the parameters that they are added to.

A checkpoint of such a run has no copy of them. The workdir keeps them once, in `base/`, and in
`lora.json` where they come from, so that a run that goes on has the same ones, to the bit, whatever
became of the run or the file that they were read from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from checkpoints.locations import run_directory
from checkpoints.lora import BASE, LoraRecord, recorded_lora
from checkpoints.restore import restore_parameters
from checkpoints.training import Checkpoints
from errors import UserError
from model.adapters import COLLECTION, merged, scaled
from model.config import ModelConfig
from train.lora import Lora, begun_as, learnt_shapes
from train.setup import Setup
from train.state import StateOverBase, TrainState, abstract_state


class Origin(NamedTuple):
    """Where parameters come from.

    Attributes:
      path: a checkpoint of a run, or `hf:DIR`; "" for parameters drawn from the run's seed.
      step: of the run that the checkpoint is of, else 0.
    """

    path: str
    step: int


def abstract_learnt(
    model: ModelConfig, lora: Lora | None, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns what a checkpoint has of a run's state, as `abstract_state` does."""
    return abstract_state(model, optimizer, mesh, learnt_shapes(model, lora))


def abstract_run_state(
    model: ModelConfig, lora: Lora | None, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns a run's state, with the base where there are adapters, as `abstract_state` does."""
    learnt = abstract_learnt(model, lora, optimizer, mesh)
    if lora is None:
        return learnt
    base = abstract_state(model, optax.identity(), mesh).variables
    return StateOverBase.of(learnt, base, lora.scale)


def kept_base(
    setup: Setup,
    lora: Lora,
    workdir: Path,
    make: Callable[[], tuple[Origin, dict]],
    *,
    resumes: bool,
) -> dict:
    """Returns the base {"params", "router"} of a run, which its workdir keeps from then on.

    Args:
      make: returns where the base comes from, and its variables.
      resumes: whether the run has a checkpoint, so that it must have a base.

    Raises:
      UserError: the base of a run that goes on is gone.
    """
    with Checkpoints(workdir / BASE, keep=1) as kept:
        there = recorded_lora(workdir) is not None and kept.latest() is not None
        if resumes and not there:
            raise UserError(
                f"{kept.directory}: the parameters are gone that the adapters of this run are "
                "added to; restore the directory and lora.json, or begin in another --workdir"
            )
        abstract = abstract_state(setup.model, optax.identity(), setup.mesh).variables
        if there:
            return kept.restore(abstract)
        origin, variables = make()
        kept.delete_after(-1)  # of a run that died before it was recorded
        kept.save(0, variables)
        kept.wait()
        if jax.process_index() == 0:
            LoraRecord(lora.rank, lora.scale, lora.matrices, *origin).write(workdir)
        return variables


def merged_variables(model: ModelConfig, mesh: Mesh, path: str | Path, record: LoraRecord) -> dict:
    """Reads {"params", "router"} of a run with adapters, these added to its base.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.
      record: of that run.

    Raises:
      UserError: there is no checkpoint or no base, or they do not fit the model.
    """
    lora = Lora(record.rank, record.scale, record.matrices)
    abstract = abstract_state(model, optax.identity(), mesh)
    learnt = abstract_learnt(model, lora, optax.identity(), mesh).variables
    adapters = restore_parameters(Path(path), learnt)
    base = restore_parameters(run_directory(path) / BASE, {"params": abstract.params})

    def add(params: dict, adapters: dict) -> dict:
        return merged({"params": params, COLLECTION: scaled(adapters, record.scale)})["params"]

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    with jax.set_mesh(mesh):
        params = jax.jit(add, donate_argnums=0, out_shardings=where)(
            base["params"], adapters["params"]
        )
    return {"params": params, "router": adapters["router"]}


def first_adapters(setup: Setup, lora: Lora, base: dict, seed: int) -> dict:
    """Returns {"params": new adapters, "router": a copy of the base's}, on the mesh.

    Raises UserError where `train.lora_from` cannot be read.
    """
    given = lora.read(setup.model)
    where = abstract_learnt(setup.model, lora, optax.identity(), setup.mesh).variables
    shardings = jax.tree.map(lambda leaf: leaf.sharding, where["params"])
    key = jax.random.fold_in(jax.random.key(seed), 2)
    with jax.set_mesh(setup.mesh):
        first = jax.jit(
            lambda key, given: begun_as(lora.first(setup.model, key), given),
            out_shardings=shardings,
        )
        return {"params": first(key, given), "router": jax.tree.map(jnp.copy, base["router"])}
