"""What each step learns from: groups of completions, sampled to their end or in parts.

A group is the G completions of a problem that is drawn. Groups are numbered in the order in which
they begin, and a group's number decides its problem and its random keys. A step takes P groups that
are complete. By default it begins P and waits for all of them. As completions differ in length, two
options let it go on earlier (partial rollouts: Kimi k1.5, arXiv 2501.12599):

* with more than P groups in flight, it waits for the first P of them to be complete;
* with a budget of tokens it waits no longer than until these are sampled, but for one group.

What is unfinished then goes on in a later step. Each token keeps the log-prob of the weights that
sampled it, and their version.
"""

import base64
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from checkpoints.cursors import Place
from data.tasks.problem import Problem
from rl.config import ReinforceConfig
from rl.generate import Completion, Generator
from rl.problems import problem_of_draw
from rl.request import keys_of
from rl.trajectory import UNFINISHED, Trajectory
from rl.trajectory_bytes import from_bytes, to_bytes


@dataclasses.dataclass(frozen=True)
class Group:
    """The completions of a problem that was drawn, in the order of their numbers."""

    problem: Problem
    completions: Sequence[Completion]


class Rollouts:
    """The groups that are in flight. It is the cursor of a run: its state goes into checkpoints.

    Args:
      generate: samples them; nothing else may be unfinished in its engine.
      problems: that are drawn.
      config: how many groups a step takes, how many are in flight, and what ends a step.
      key: with a group's number it decides what its completions are.
      seed: of the order of the problems.
    """

    def __init__(
        self,
        generate: Generator,
        problems: Sequence[Problem],
        config: ReinforceConfig,
        key: Array,
        seed: int,
    ):
        self._generate, self._problems, self._config = generate, problems, config
        self._key, self._seed = key, seed
        self._begun = 0
        # Number of a group -> number of a completion -> what it has, unless that is in the engine,
        # which has completions of the groups in the set.
        self._in_flight: dict[int, dict[int, Trajectory]] = {}
        self._in_engine: set[int] = set()

    def take(self, step: int, variables: dict) -> list[Group]:
        """Samples, and returns the groups that a step learns from, the first begun first.

        Args:
          step: its number, from 1 on. The version of its tokens is the number of steps before it.
        """
        config, engine = self._config, self._generate.engine
        if not config.in_parts:
            self._begun = (step - 1) * config.prompts_per_step
        while len(self._in_flight) < config.in_flight:
            self._in_flight[self._begun] = {}
            self._begun += 1
        sampled = engine.counts.sampled
        with self._sampling(variables, step - 1):
            while engine.busy and self._goes_on(engine.counts.sampled - sampled):
                for trajectory in engine.step():
                    self._in_flight[trajectory.group][trajectory.sample] = trajectory
        return [self._taken(number) for number in self._complete()[: config.prompts_per_step]]

    def _goes_on(self, sampled: int) -> bool:
        """Tells whether a step samples more, which has sampled so many tokens."""
        complete, most = len(self._complete()), self._config.rollout_tokens
        spent = most and complete and sampled >= most
        return complete < self._config.prompts_per_step and not spent

    def _complete(self) -> list[int]:
        """Returns the numbers of the groups that are complete, in order."""
        size = self._config.group_size
        return sorted(
            number
            for number, group in self._in_flight.items()
            if len(group) == size and all(each.ended != UNFINISHED for each in group.values())
        )

    def _taken(self, number: int) -> Group:
        """Takes a complete group out of those in flight."""
        group = self._in_flight.pop(number)
        self._in_engine.discard(number)
        completions = [self._generate.completion(group[sample]) for sample in sorted(group)]
        return Group(problem_of_draw(number, self._problems, self._seed), completions)

    @contextlib.contextmanager
    def _sampling(self, variables: dict, version: int) -> Iterator[None]:
        """Gives the engine variables, and all groups in flight that it does not have."""
        engine = self._generate.engine
        if self._config.unfinished == "kept":
            engine.load(variables, version)
            self._submit()
            yield
            engine.unload()
            return
        with engine.loaded(variables, version):
            self._submit()
            yield
            self.settle()

    def _submit(self) -> None:
        per_step, size = self._config.prompts_per_step, self._config.group_size
        new = sorted(self._in_flight.keys() - self._in_engine)
        for step, numbers in itertools.groupby(new, lambda number: number // per_step + 1):
            numbers = list(numbers)
            key, places = jax.random.fold_in(self._key, step), [each % per_step for each in numbers]
            for number, keys_G2 in zip(numbers, keys_of(key, places, size), strict=True):
                problem = problem_of_draw(number, self._problems, self._seed)
                prompt = self._generate.prompt(problem, keys_G2, number)
                self._generate.engine.submit(prompt, self._in_flight[number])
        self._in_engine.update(new)

    def settle(self) -> None:
        """Takes what is unfinished out of the engine, so that it is read again when it goes on.

        A run that goes on from a checkpoint has to do so; a run that saves one does too, so that
        both go on alike.
        """
        for trajectory in self._generate.engine.take_out():
            self._in_flight[trajectory.group][trajectory.sample] = trajectory
        self._in_engine.clear()

    def place(self) -> Place:
        """Returns where it is now; what is in the engine begins anew from there."""
        in_flight = {number: dict(group) for number, group in self._in_flight.items()}
        return Place(functools.partial(_state, self._begun, in_flight))

    def get_state(self) -> dict[str, Any]:
        """Returns where it is as JSON; `settle` comes before, if nothing is to begin anew."""
        return self.place().get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self._begun, self._in_engine = state["begun"], set()
        self._in_flight = {number: {} for number in state["groups"]}
        for trajectory in from_bytes(base64.b64decode(state["trajectories"])):
            self._in_flight[trajectory.group][trajectory.sample] = trajectory

    def metrics(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Returns what there is to say of a step in parts, and nothing of another.

        "groups" that it learns from, "unfinished" ones that go on later, and how many steps older
        its tokens' policy is than the step's, "sampler/staleness_mean" and "sampler/staleness_max".
        """
        if not self._config.in_parts:
            return {}
        trajectories = [each.trajectory for group in groups for each in group.completions]
        ages = np.concatenate([step - 1 - each.versions_T[each.sampled_T] for each in trajectories])
        return {
            "groups": len(groups),
            "unfinished": len(self._in_flight),
            "sampler/staleness_mean": float(np.mean(ages)),
            "sampler/staleness_max": float(np.max(ages)),
        }


def _state(begun: int, in_flight: dict[int, dict[int, Trajectory]]) -> dict[str, Any]:
    trajectories = [group[sample] for group in in_flight.values() for sample in sorted(group)]
    encoded = base64.b64encode(to_bytes(trajectories)).decode()
    return {"begun": begun, "groups": sorted(in_flight), "trajectories": encoded}
