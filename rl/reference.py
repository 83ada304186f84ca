"""Where a run of reinforcement begins: its policy, its critic and its reference.

The reference is the model that reinforcement started from, or one that the config names: a teacher.
The workdir keeps it (train/reference.py). With `reinforce.reference_every` it becomes the policy as
it is every so many steps; `reference/` then has one for each checkpoint that the run may go on
from.

Where adapters learn (train.lora), the reference is their base: the same arrays, in memory and on
disk, until `reinforce.reference_every` makes it another.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from checkpoints.cursors import Cursor
from checkpoints.training import Checkpoints
from model.adapters import merged
from rl.config import ReinforceConfig
from rl.critic import Critic
from train.config import TrainConfig
from train.reference import DIRECTORY, keep_reference, restored_reference
from train.restore import restored_or_new
from train.setup import Setup
from train.state import StateOverBase, StateWithCritic, TrainState, abstract_state, state_from


class Reference:
    """What a divergence compares the policy with.

    Attributes:
      variables: of the reference, on the mesh; None where nothing asks for one.

    Args:
      kept: `reference/` of the workdir; None where the reference is the base of adapters.
      every: steps after which it becomes the policy as it is; 0 keeps it.
      first: the number under which the first one is kept.
    """

    def __init__(self, kept: Checkpoints | None, variables: dict, every: int, first: int):
        self.variables: dict | None = variables
        self._kept, self._every, self._first = kept, every, first

    def after(self, step: int, variables: dict) -> None:
        """Becomes the policy's variables, where that is due after `step`."""
        if self._kept is not None and self._every and step % self._every == 0:
            self.variables = jax.tree.map(jnp.copy, merged(variables))
            self._kept.save(self._first + step, self.variables)


@contextlib.contextmanager
def begun(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    workdir: Path,
    cursor: Cursor | None,
    critic: Critic | None,
    train: TrainConfig,
    reinforce: ReinforceConfig,
    *,
    needs_reference: bool,
    init_from: str,
    seed: int,
) -> Iterator[tuple[TrainState, Reference | None]]:
    """Yields the state that a run goes on from, its critic's too, and its reference.

    A run with a checkpoint moves the cursor to the place in it. One without starts from its
    reference, and one that is new makes it first.

    Args:
      critic: of the algorithm; None where it has none.
      train: says how many checkpoints there are; each of them has its own reference.
      reinforce: `reference`, `reference_every` and `critic_from`.
      needs_reference: whether the algorithm compares with one.

    Raises:
      UserError: a checkpoint does not fit the model, or the reference is gone.
    """
    resumes, every = checkpoints.latest() is not None, reinforce.reference_every

    def policy() -> TrainState:
        """Returns the state of the run's newest checkpoint, or a new one."""
        if resumes and critic is not None:
            return _resumed(setup, optimizer, checkpoints, cursor, critic)
        state = restored_or_new(
            setup, optimizer, checkpoints, cursor, init_from=init_from, seed=seed
        )
        return _with_critic(setup, state, critic, reinforce)

    if not needs_reference:
        yield policy(), None
        return
    most = references_kept(train, every)
    if setup.lora is not None and not reinforce.reference:
        state = policy()
        assert isinstance(state, StateOverBase)
        if not every:
            yield state, Reference(None, state.base, 0, 0)
            return
        with Checkpoints(workdir / DIRECTORY, keep=most) as kept:
            number = _last_due(state, reinforce)
            kept.delete_after(number)
            variables = restored_reference(setup, kept, number) if number else state.base
            yield state, Reference(kept, variables, every, 0)
        return
    with Checkpoints(workdir / DIRECTORY, keep=most) as kept:
        origin_path = reinforce.reference or init_from
        first = keep_reference(setup, kept, origin_path, seed, resumes=resumes)
        if resumes or reinforce.reference:
            state = policy()
        else:
            variables = restored_reference(setup, kept, first)
            state = state_from(variables, setup.model, optimizer, setup.mesh)
            state = _with_critic(setup, state, critic, reinforce)
        number = first + _last_due(state, reinforce)
        kept.delete_after(number)  # of a run that died after its last checkpoint
        yield state, Reference(kept, restored_reference(setup, kept, number), every, first)


def references_kept(train: TrainConfig, every: int) -> int:
    """Returns how many references a run keeps, so that each of its checkpoints has its own."""
    if not every:
        return 1
    return math.ceil((train.max_to_keep + 1) * train.save_every / every) + 2


def _last_due(state: TrainState, reinforce: ReinforceConfig) -> int:
    """Returns the last step after which the reference has become the policy; 0 for none."""
    every = reinforce.reference_every
    done = int(state.step) // (reinforce.epochs * reinforce.minibatches)
    return done // every * every if every else 0


def _resumed(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    cursor: Cursor | None,
    critic: Critic,
) -> TrainState:
    """Reads the run's newest checkpoint, that of its critic too, and moves the cursor."""
    policy = abstract_state(setup.model, optimizer, setup.mesh)
    return checkpoints.restore(StateWithCritic.of(policy, critic.abstract), cursor)


def _with_critic(
    setup: Setup, state: TrainState, critic: Critic | None, reinforce: ReinforceConfig
) -> TrainState:
    """Returns a new state with a new critic: of the policy's trunk, or another run's."""
    if critic is None:
        return state
    path = reinforce.critic_from
    new = critic.from_run(path) if path else critic.from_policy(state.variables)
    return StateWithCritic.of(state, new)
