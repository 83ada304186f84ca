"""One set of programs for all that compute the same, in the tests of a process.

Tracing and compiling a program takes seconds. Tests make an engine for each number of steps, and a
run for each way to stop one; a command makes all of its programs anew.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from rl.agreement import Agreement
from rl.algorithms.spec import get_algorithm
from rl.canary import jit_mean_gap
from rl.compared import jit_score
from rl.config import ReinforceConfig
from rl.critic import Critic
from rl.learner import jit_policy_step, jit_reset
from rl.programs import Programs
from rl.signals import jit_step_signals, jit_update_signals
from train.config import TrainConfig
from train.loop import compiled_step
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.preference_objective import preference_objective
from train.setup import Setup
from train.state import fresh_state, state_from
from train.step import jit_evaluation

programs_of = functools.cache(Programs)
NO_MOMENTS = optax.identity()
_MADE: list[dict] = []


def let_go() -> None:
    """Forgets what `once` has made, and engines' programs, so that the programs among it can go."""
    programs_of.cache_clear()
    for made in _MADE:
        made.clear()


@pytest.fixture(autouse=True, scope="session")
def shared_programs():
    """Engines that differ in nothing that is compiled share their programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.engine.Programs", programs_of)
        yield


def once(make: Callable, key: Callable[..., Hashable] = lambda *args, **kwargs: None) -> Callable:
    """Returns a function that makes the same thing once.

    Args:
      key: of its arguments, says what is the same; None where they themselves do.
    """
    made = {}
    _MADE.append(made)

    def of(*args: Any, **kwargs: Any) -> Any:
        wanted = key(*args, **kwargs) or (args, tuple(sorted(kwargs.items())))
        if wanted not in made:
            made[wanted] = make(*args, **kwargs)
        return made[wanted]

    return of


def by_setup(setup: Setup, *others: Hashable) -> Hashable:
    """What is the same for runs of one model on one mesh, whose tokenizers are other objects."""
    return setup.model, setup.mesh, *others


def by_setup_and_options(setup: Setup, *others: Hashable, **options: Hashable) -> Hashable:
    """As `by_setup`, with arguments by name."""
    return by_setup(setup, *others), tuple(sorted(options.items()))


def of_critic(setup: Setup, train: TrainConfig, reinforce: ReinforceConfig) -> Hashable:
    """What the programs of a critic depend on."""
    own = reinforce.critic_learning_rate, reinforce.value_clip, reinforce.minibatches
    return by_setup(setup, train, *own)


def parameters_of(*args: Any) -> Hashable:
    """An optimizer is made for the shapes of parameters, which are no key."""
    train, parameters = args
    return train, str(parameters)


def by_key(*args: Any) -> Hashable:
    """The last argument is a random key."""
    return *args[:-1], str(jax.random.key_data(args[-1]))


def copy_of(arrays: Any) -> Any:
    """The same arrays once more: a step donates those that it gets."""
    return jax.tree.map(jnp.copy, arrays)


@pytest.fixture(autouse=True, scope="session")
def runs_share_programs():
    """Runs that differ in nothing that is compiled share their programs and first state."""
    # Drawing parameters takes seconds to trace and compile, making moments does not.
    drawn = once(
        lambda model, mesh, key: fresh_state(model, NO_MOMENTS, mesh, key).variables, by_key
    )

    def begun(model: Any, optimizer: Any, mesh: Any, key: Any) -> Any:
        return state_from(copy_of(drawn(model, mesh, key)), model, optimizer, mesh)

    first = once(begun, by_key)

    def copy_of_first(*args: Any) -> Any:
        return copy_of(first(*args))

    optimizer_of = once(make_optimizer, parameters_of)
    compiled = once(
        compiled_step,
        lambda setup, _, data, objective, optimizer: by_setup(
            setup, data.batch_size, data.seq_len, objective, optimizer
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        for place in ("rl.learner", "train.loop"):
            patch.setattr(f"{place}.make_optimizer", optimizer_of)
        patch.setattr("train.restore.fresh_state", copy_of_first)
        patch.setattr("rl.loop.get_algorithm", once(get_algorithm))
        patch.setattr("rl.learner.jit_policy_step", once(jit_policy_step, by_setup))
        patch.setattr("rl.learner.jit_score", once(jit_score, by_setup_and_options))
        for make in (jit_step_signals, jit_update_signals, jit_reset):
            patch.setattr(f"rl.learner.{make.__name__}", once(make, by_setup))
        patch.setattr("rl.learner.Critic", once(Critic, of_critic))
        patch.setattr("rl.loop.Agreement", once(Agreement, by_setup))
        patch.setattr("rl.canary.jit_mean_gap", once(jit_mean_gap, by_setup))
        patch.setattr("train.loop.language_objective", once(language_objective))
        patch.setattr("train.loop.preference_objective", once(preference_objective))
        patch.setattr("train.loop.jit_evaluation", once(jit_evaluation))
        patch.setattr("train.loop.compiled_step", compiled)
        yield
