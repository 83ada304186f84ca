"""What samples in a run of reinforcement, and all else that needs its engine.

Groups of completions for the steps, greedy ones beside them, the canary and the held-out problems
go through engines on one mesh, and so by one thread at a time: rl/ahead.py says by which.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from checkpoints.cursors import Place
from data.tasks.problem import Problem
from rl.algorithms.row import Algorithm
from rl.canary import Canary
from rl.clock import Parts
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.curriculum import Curriculum
from rl.generate import Completion, Generator
from rl.measure import lengths_by_outcome
from rl.pass_rates import PassRates, problems_within
from rl.pay import Rewards, paid_weights, reward, solved
from rl.problems import problems_to_train, prompt_of
from rl.reasoning import ReasoningEvaluation
from rl.records import kept_records, records_made
from rl.request import Counts
from rl.rollouts import Group, Rollouts
from rl.servers.server import Server
from train.config import TrainConfig
from train.setup import Setup


class Sampled(NamedTuple):
    """What a step has from its sampler.

    groups: those that are learnt from, the first begun first.
    left_out: those that are not, since all of their completions earn the same.
    greedy_P: what the greedy completion of each group's problem earns in all, float32 [P]; None
      where the algorithm compares with none.
    counts: what the engine did meanwhile.
    metrics: what there is to say of it beside its completions, by name, with the seconds of its
      parts.
    """

    groups: list[Group]
    left_out: list[Group]
    greedy_P: np.ndarray | None
    counts: Counts
    metrics: dict[str, float]

    @property
    def completions(self) -> list[Completion]:
        """All that are learnt from, group by group."""
        return [each for group in self.groups for each in group.completions]

    @property
    def rewards(self) -> Rewards:
        """What these earn."""
        return Rewards.joined([group.rewards for group in self.groups])


class Sampler:
    """Samples what the steps of a run learn from.

    Args:
      setup: of the mesh that samples.
      template: how prompts are written, `data.chat_template`.
      server: that samples in place of this process, if one does.
      pass_rates: tries of the problems before the run.

    Raises:
      UserError: the task or a prompt does not fit, or no slot fits the memory allowed.
    """

    def __init__(
        self,
        setup: Setup,
        train: TrainConfig,
        sampling: SamplingConfig,
        reinforce: ReinforceConfig,
        evaluate: EvaluateConfig,
        algorithm: Algorithm,
        *,
        template: str,
        seed: int,
        server: Server | None = None,
        pass_rates: PassRates | None = None,
    ):
        self.setup, self._parts = setup, Parts()
        found = problems_to_train(reinforce.task, sampling, setup.tokenizer, template, seed)
        problems = problems_within(found.problems, pass_rates, reinforce)
        draws = train.steps * reinforce.prompts_per_step
        made = records_made(setup.model, train.stage)
        recorded = kept_records(made, sampling, reinforce)
        if reinforce.agreement_rows:
            recorded |= made
        self._generate = Generator(
            setup,
            sampling,
            template,
            completions=reinforce.in_flight * reinforce.group_size,
            group_size=reinforce.group_size,
            record=recorded,
            server=server,
        )
        self._greedy = None
        if "greedy" in algorithm.needs:
            self._greedy = _greedy(setup, sampling, template, reinforce.prompts_per_step, server)
        self._key = jax.random.fold_in(jax.random.key(seed), 1)
        weights = paid_weights(reinforce, evaluate)
        options, longest = algorithm.options, sampling.most_sampled

        def pay(problem: Problem, completions: Sequence[Completion]) -> Rewards:
            with self._parts("reward"):
                return reward(
                    completions, [problem], weights, reinforce.truncated, options, longest
                )

        self._pay, self._judged = pay, evaluate.reward in weights
        self._solves = functools.partial(solved, evaluate=evaluate)
        self._rollouts = Rollouts(
            self._generate,
            problems,
            Curriculum(problems, reinforce, draws, seed, pass_rates),
            reinforce,
            pay,
            self._solves,
            self._key,
        )
        self._canary = None
        if (
            reinforce.canary_tolerance
            and sampling.attention_top_p == 1
            and (server or made <= recorded)
        ):
            self._canary = Canary(
                setup,
                self._generate.engine,
                prompt_of(problems[0], setup.tokenizer, template),
                stage=train.stage,
                sampling=sampling,
                tolerance=reinforce.canary_tolerance,
            )
        self._held_out = None
        if train.eval_every:
            self._held_out = ReasoningEvaluation(setup, evaluate, reinforce, self._generate, seed)

    def take(self, step: int, variables: dict) -> Sampled:
        """Samples what a step learns from.

        Args:
          step: its number, from 1 on.
          variables: of the policy that samples, on this mesh.

        Raises UserError where the canary finds that sampler and trainer do not agree.
        """
        metrics = {}
        self._parts.collect()  # what a run that goes on pays anew is of no step
        with jax.set_mesh(self.setup.mesh):
            if self._canary:
                with self._parts("canary"):
                    metrics["sampling/canary_gap"] = self._canary.check(step, variables)
            before = dataclasses.replace(self._generate.engine.counts)
            with self._parts("gen"):
                taken = self._rollouts.take(step, variables)
            counts, greedy_P = self._generate.engine.counts.since(before), None
            if self._greedy:
                with self._parts("gen_max"):
                    greedy_P = self._greedy_rewards(taken.groups, variables)
        metrics |= self._rollouts.metrics(taken) | self._parts.collect()
        if self._judged:
            metrics |= lengths_by_outcome([*taken.groups, *taken.left_out], self._solves)
        if self._generate.sampling.thinking:
            sampled = [x for group in (*taken.groups, *taken.left_out) for x in group.completions]
            metrics["completions/interrupted_ratio"] = float(
                np.mean([completion.interrupted for completion in sampled])
            )
        return Sampled(*taken, greedy_P, counts, metrics)

    def _greedy_rewards(self, groups: Sequence[Group], variables: dict) -> np.ndarray:
        assert self._greedy is not None
        problems = [group.problem for group in groups]
        numbers = range(len(problems))
        found = dict(self._greedy.groups(variables, problems, self._key, numbers, 1))
        paid = [self._pay(problem, found[place]) for place, problem in enumerate(problems)]
        return Rewards.joined(paid).total_PG[:, 0]

    def validation(self, variables: dict) -> dict[str, float]:
        """Returns the figures of an evaluation on held-out problems; train.eval_every is not 0."""
        assert self._held_out is not None
        with jax.set_mesh(self.setup.mesh):
            return self._held_out.validation(variables)

    def stop(self) -> None:
        """Ends a `take` that another thread is in, by an error there."""
        self._rollouts.stop()

    def settle(self) -> None:
        """See `Rollouts.settle`."""
        self._rollouts.settle()

    def place(self) -> Place:
        """Returns where its rollouts are now."""
        return self._rollouts.place()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from the state of such a place. Raises UserError as `Rollouts.set_state` does."""
        self._rollouts.set_state(state)

    def packed(self, sampled: Sampled) -> dict[str, Any]:
        """Returns what was sampled as JSON."""
        greedy = None if sampled.greedy_P is None else sampled.greedy_P.tolist()
        return {
            "groups": self._rollouts.packed(sampled.groups),
            "left_out": self._rollouts.packed(sampled.left_out),
            "greedy": greedy,
            "counts": vars(sampled.counts),
            "metrics": sampled.metrics,
        }

    def unpacked(self, packed: Mapping[str, Any]) -> Sampled:
        """Returns what `packed` made JSON of. Raises UserError if one of its problems is gone."""
        greedy = packed["greedy"]
        return Sampled(
            self._rollouts.unpacked(packed["groups"]),
            self._rollouts.unpacked(packed["left_out"]),
            None if greedy is None else np.asarray(greedy, np.float32),
            Counts(**packed["counts"]),
            packed["metrics"],
        )


def _greedy(
    setup: Setup, sampling: SamplingConfig, template: str, prompts: int, server: Server | None
) -> Generator:
    """Returns what makes the greedy completion of each prompt of a step."""
    greedy = dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
    return Generator(setup, greedy, template, completions=prompts, group_size=1, server=server)
