"""What each step learns from: groups of completions, sampled to their end or in parts.

A group is the G completions of a problem that is drawn. Groups are numbered in the order in which
they begin, and a group's number decides its random keys; rl/curriculum.py says whose problem's turn
it is. A step takes P groups that are complete. By default it begins P and waits for all of them.
As completions differ in length, two options let it go on earlier (partial rollouts: Kimi k1.5,
arXiv 2501.12599):

* with more than P groups in flight, it waits for the first P of them to be complete;
* with a budget of tokens it waits no longer than until these are sampled, but for one group.

What is unfinished then goes on in a later step. Each token keeps the log-prob of the weights that
sampled it, and their version. And a step may sample on in place of groups that teach nothing
(dynamic sampling: DAPO, arXiv 2503.14476, eq. 11).
"""

import base64
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from checkpoints.cursors import Place
from data.tasks.problem import Problem
from errors import UserError
from rl.config import ReinforceConfig
from rl.curriculum import Curriculum
from rl.generate import Completion, Generator
from rl.pay import Rewards
from rl.request import keys_of
from rl.trajectory import UNFINISHED, Trajectory
from rl.trajectory_bytes import from_bytes, to_bytes


@dataclasses.dataclass(frozen=True)
class Group:
    """The completions of a problem that was drawn, in the order of their numbers, and their pay.

    Attributes:
      rewards: of P = 1 problem and its G completions.
    """

    problem: Problem
    completions: Sequence[Completion]
    rewards: Rewards


class Taken(NamedTuple):
    """What a step takes.

    groups: those that are learnt from, the first begun first.
    left_out: those that are not, since all of their completions earn the same.
    """

    groups: list[Group]
    left_out: list[Group]


class Stopped(Exception):
    """A step that is sampled is not wanted any more."""


class Rollouts:
    """The groups that are in flight. It is the cursor of a run: its state goes into checkpoints.

    Args:
      generate: samples them; nothing else may be unfinished in its engine.
      problems: that are drawn.
      curriculum: says whose turn is when.
      config: how many groups a step takes, how many are in flight, and what ends a step.
      pay: (problem, completions) -> what they earn.
      solves: rewards of a group -> which of its completions solve their problem, bool [G].
      key: with a group's number it decides what its completions are.
    """

    def __init__(
        self,
        generate: Generator,
        problems: Sequence[Problem],
        curriculum: Curriculum,
        config: ReinforceConfig,
        pay: Callable[[Problem, Sequence[Completion]], Rewards],
        solves: Callable[[Rewards], np.ndarray],
        key: Array,
    ):
        self._generate, self._problems, self._config = generate, problems, config
        self._curriculum, self._pay, self._solves, self._key = curriculum, pay, solves, key
        self._begun = 0
        # Number of a group -> number of a completion -> what it has, unless that is in the engine,
        # which has completions of the groups in the set.
        self._in_flight: dict[int, dict[int, Trajectory]] = {}
        self._in_engine: set[int] = set()
        self._places: dict[int, int] = {}  # number of a group in flight -> place of its problem
        self._paid: dict[int, Group] = {}  # groups in flight that are complete
        self._stopped = False

    def take(self, step: int, variables: dict) -> Taken:
        """Samples, and returns the groups that a step learns from.

        Args:
          step: its number, from 1 on. The version of its tokens is the number of steps before it.
        """
        config, engine = self._config, self._generate.engine
        if not config.remembers:
            self._begun = (step - 1) * config.prompts_per_step
            self._curriculum.at(self._begun)
        self._begin()
        sampled, left_out = engine.counts.sampled, []
        with self._sampling(variables, step - 1):
            while engine.busy and self._goes_on(engine.counts.sampled - sampled):
                if self._stopped:
                    raise Stopped
                for trajectory in engine.step():
                    self._in_flight[trajectory.group][trajectory.sample] = trajectory
                left_out += self._replaced(len(left_out))
        taken = [self._take_out(number) for number in self._complete()[: config.prompts_per_step]]
        for number, group in sorted(taken + left_out, key=lambda each: each[0]):
            self._curriculum.note(self._places.pop(number), self._solves(group.rewards).tolist())
        groups, replaced = ([group for _, group in part] for part in (taken, left_out))
        differing = [group for group in groups if not self._equal(group)]
        # Where no group differs all are learnt from: that changes nothing but counters.
        if config.zero_variance != "dropped" or not differing:
            return Taken(groups, replaced)
        return Taken(differing, [group for group in groups if self._equal(group)])

    def _begin(self) -> None:
        """Begins groups until as many are in flight as there are to be."""
        while len(self._in_flight) < self._config.in_flight:
            self._in_flight[self._begun] = {}
            self._places[self._begun] = self._curriculum.draw()
            self._begun += 1

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

    def _replaced(self, before: int) -> list[tuple[int, Group]]:
        """Takes groups that show no difference out of those in flight, and begins others.

        Args:
          before: how many the step has replaced already.

        Returns:
          Their numbers, and the groups.
        """
        config = self._config
        if config.zero_variance != "replaced":
            return []
        most = (config.resample_limit - 1) * config.prompts_per_step - before
        equal = [number for number in self._complete() if self._equal(self._group(number))][:most]
        found = [self._take_out(number) for number in equal]
        if found:
            self._begin()
            self._submit()
        return found

    def _group(self, number: int) -> Group:
        """Returns a complete group, which is paid once."""
        if number not in self._paid:
            group, problem = self._in_flight[number], self._problem(number)
            completions = [self._generate.completion(group[sample]) for sample in sorted(group)]
            self._paid[number] = Group(problem, completions, self._pay(problem, completions))
        return self._paid[number]

    def _problem(self, number: int) -> Problem:
        return self._problems[self._places[number]]

    def _take_out(self, number: int) -> tuple[int, Group]:
        """Takes a complete group out of those in flight."""
        group = self._group(number)
        del self._in_flight[number], self._paid[number]
        self._in_engine.discard(number)
        return number, group

    def _equal(self, group: Group) -> bool:
        """Tells whether all completions of a group earn the same."""
        return bool(np.ptp(group.rewards.of(self._config.variance_reward)) == 0)

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
                prompt = self._generate.prompt(self._problem(number), keys_G2, number)
                self._generate.engine.submit(prompt, self._in_flight[number])
        self._in_engine.update(new)

    def stop(self) -> None:
        """Lets a `take` that another thread is in raise `Stopped`."""
        self._stopped = True

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
        ids = {number: self._problem(number).id for number in in_flight}
        curriculum = self._curriculum.get_state()
        return Place(functools.partial(_state, self._begun, in_flight, ids, curriculum))

    def get_state(self) -> dict[str, Any]:
        """Returns where it is as JSON; `settle` comes before, if nothing is to begin anew."""
        return self.place().get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
          UserError: a problem of which completions are unfinished is not there any more.
        """
        self._begun, self._in_engine, self._paid = state["begun"], set(), {}
        self._curriculum.set_state(state["curriculum"])
        self._in_flight = {number: {} for number in state["groups"]}
        places = self._places_of(state["problems"])
        self._places = dict(zip(state["groups"], places, strict=True))
        for trajectory in from_bytes(base64.b64decode(state["trajectories"])):
            self._in_flight[trajectory.group][trajectory.sample] = trajectory

    @property
    def in_parts(self) -> bool:
        """Whether completions may go on in a later step than they began in."""
        return self._config.in_parts

    def packed(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Returns groups that are complete as JSON."""
        trajectories = [each.trajectory for group in groups for each in group.completions]
        encoded = base64.b64encode(to_bytes(trajectories)).decode()
        return {"problems": [group.problem.id for group in groups], "trajectories": encoded}

    def unpacked(self, packed: dict[str, Any]) -> list[Group]:
        """Returns the groups that `packed` made JSON of; they are paid anew.

        Raises UserError if a problem is not there any more.
        """
        trajectories = from_bytes(base64.b64decode(packed["trajectories"]))
        size, groups = self._config.group_size, []
        for number, place in enumerate(self._places_of(packed["problems"])):
            own = trajectories[number * size : (number + 1) * size]
            completions, problem = list(map(self._generate.completion, own)), self._problems[place]
            groups.append(Group(problem, completions, self._pay(problem, completions)))
        return groups

    def _places_of(self, ids: Sequence[str]) -> list[int]:
        """Returns where problems are, by their ids. Raises UserError if one is not there."""
        place_of = {problem.id: place for place, problem in enumerate(self._problems)}
        missing = [name for name in ids if name not in place_of]
        if missing:
            raise UserError(
                f"problem {missing[0]}: the run has completions of it to learn from, and it is not "
                f"in reinforce.task = {self._config.task!r} as it is now"
            )
        return [place_of[name] for name in ids]

    def metrics(self, taken: Taken) -> dict[str, float]:
        """Returns what there is to say of a step beside its completions.

        Of one in parts "unfinished" groups, that go on later. Where not all of what is sampled is
        learnt from, "groups" that are, and "left_out", those that are not. Where the order depends
        on what was solved, the curriculum's.
        """
        config, found = self._config, {}
        if config.zero_variance != "kept" or config.in_parts:
            found["groups"] = len(taken.groups)
        if config.zero_variance != "kept":
            found["left_out"] = len(taken.left_out)
        if config.order != "shuffled" or config.retire_at:
            found |= self._curriculum.metrics()
        if config.in_parts:
            found["unfinished"] = len(self._in_flight)
        return found


def _state(
    begun: int,
    in_flight: dict[int, dict[int, Trajectory]],
    ids: dict[int, str],
    curriculum: dict[str, Any],
) -> dict[str, Any]:
    trajectories = [group[sample] for group in in_flight.values() for sample in sorted(group)]
    numbers = sorted(in_flight)
    return {
        "begun": begun,
        "groups": numbers,
        "problems": [ids[number] for number in numbers],
        "trajectories": base64.b64encode(to_bytes(trajectories)).decode(),
        "curriculum": curriculum,
    }
