"""Measures how many problems the policy solves: completions, rewards and pass@k."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data.tasks.problem import Problem
from rl.config import EvaluateConfig, ReinforceConfig
from rl.evaluate import pass_at_k_table
from rl.generate import Completion, Generator
from rl.paired import powers_of_two
from rl.problem_outcomes import Outcome, figures, rows_of
from rl.problems import problems_to_evaluate
from rl.rewards import metric_name, total_reward
from train.progress import Progress
from train.setup import Setup


class Evaluated(NamedTuple):
    """What an evaluation found.

    Attributes:
      summary: the figures that evaluation.json has.
      samples: the lines of samples.jsonl: every prompt, completion and reward.
      outcomes: what became of each problem.
    """

    summary: dict
    samples: list[dict]
    outcomes: list[Outcome]


@dataclasses.dataclass
class Tally:
    """Completions of problems, `samples` of each, and what they earn.

    Attributes:
      samples: G, completions of each problem.
      weights: reward name -> its weight in the total.
      counted: the reward that pass@k counts, and `success`, the least of it that is a success.
      temperature: that completions are sampled at.
      split: of the problems.
      solved_PG: for each of G completions of P problems, whether it is a success.
      paid: reward name -> what each completion earns, "total" among them.
      lengths: tokens of each completion.
      truncated: for each completion, whether it was cut before its stop token.
      records: the lines of samples.jsonl.
      outcomes: what became of each problem.
    """

    samples: int
    weights: Mapping[str, float]
    counted: str = "answer"
    success: float = 1.0
    temperature: float = 1.0
    split: str = "validation"
    solved_PG: list[list[bool]] = dataclasses.field(default_factory=list)
    paid: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    lengths: list[int] = dataclasses.field(default_factory=list)
    truncated: list[bool] = dataclasses.field(default_factory=list)
    records: list[dict] = dataclasses.field(default_factory=list)
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)

    def add(self, problem: Problem, completions: Sequence[Completion]) -> None:
        """Adds the completions of a problem."""
        # Whatever is counted or always reported is computed, with weight 0 in the total.
        weights = {"format": 0.0, self.counted: 0.0} | dict(self.weights)
        paid = [total_reward(completion.text, problem, weights) for completion in completions]
        self.solved_PG.append([parts[self.counted] >= self.success for _, parts in paid])
        for total, parts in paid:
            for name, value in (parts | {"total": total}).items():
                self.paid.setdefault(name, []).append(value)
        self.records.extend(
            {
                "prompt": problem.question,
                "completion": completion.text,
                "answer": problem.answer,
                "reward": parts[self.counted],
                "format": parts["format"],
                "id": problem.id,
                "rewards": parts,
                "temperature": self.temperature,
                "tokens": completion.trajectory.completion.tolist(),
                "interrupted": completion.interrupted,
            }
            for completion, (_, parts) in zip(completions, paid, strict=True)
        )
        self.lengths.extend(completion.length for completion in completions)
        self.truncated.extend(completion.truncated for completion in completions)
        counted = [parts[self.counted] for _, parts in paid]
        self.outcomes.append(
            Outcome.of(problem, completions, counted, self.success, self.temperature, self.split)
        )


class ReasoningEvaluation:
    """An evaluation on the problems of a split, to be made of any variables.

    Its problems, prompts and sampling keys are the same each time. What a problem's n-th completion
    is drawn with depends on the problem's number and n alone, on one device and on many.

    Args:
      evaluate: which problems and how many, how many completions, and what counts as a success.
      reinforce: the task and its rewards.
      generate: samples the completions.
      seed: of the keys, and of the problems to train on.

    Raises:
      UserError: the task has no such problem, or a prompt is too long.
    """

    def __init__(
        self,
        setup: Setup,
        evaluate: EvaluateConfig,
        reinforce: ReinforceConfig,
        generate: Generator,
        seed: int,
    ):
        self._evaluate, self._weights, self._generate = evaluate, reinforce.rewards, generate
        self.problems, self.left_out = problems_to_evaluate(
            reinforce.task,
            evaluate.problems,
            generate.sampling,
            setup.tokenizer,
            generate.template,
            evaluate.split,
            seed,
        )
        self._key = jax.random.fold_in(jax.random.key(seed), 2)

    def __call__(self, variables: dict) -> Evaluated:
        """Samples completions of the problems and counts those that solve them.

        The summary has pass@k and the other figures of `rl.problem_outcomes.figures`, each with its
        interval; and means of rewards, format and length.
        """
        tally = self._sampled(variables, shown=True)
        summary = self._summary(tally) | figures(tally.outcomes, self._evaluate)
        return Evaluated(summary, tally.records, tally.outcomes)

    def _sampled(self, variables: dict, *, shown: bool) -> Tally:
        """Returns the completions; `shown` shows how far it is, if it is not in another display."""
        evaluate, problems = self._evaluate, self.problems
        numbers, temperature = range(len(problems)), self._generate.sampling.temperature
        tally = Tally(
            evaluate.samples,
            self._weights,
            evaluate.reward,
            evaluate.success,
            temperature,
            evaluate.split,
        )
        bar = Progress(len(problems), "evaluate") if shown else contextlib.nullcontext()
        ended: dict[int, list[Completion]] = {}
        counts = self._generate.engine.counts
        shown_tokens = counts.sampled
        with bar as progress:
            groups = self._generate.groups(
                variables, problems, self._key, numbers, evaluate.samples, recording=False
            )
            for number, completions in groups:
                ended[number] = completions
                # In the order of their numbers, whichever ended first.
                while len(tally.solved_PG) in ended:
                    place = len(tally.solved_PG)
                    tally.add(problems[place], ended.pop(place))
                if progress is not None and tally.solved_PG:
                    # Of all that were sampled meanwhile, not of those of this problem alone: they
                    # were sampled over a longer time, beside others.
                    tokens, shown_tokens = counts.sampled - shown_tokens, counts.sampled
                    done = len(tally.solved_PG)
                    progress.update(done, {"pass@1": np.mean(tally.solved_PG)}, tokens)
        return tally

    def validation(self, variables: dict) -> dict[str, float]:
        """Returns the figures of an evaluation in the midst of a run, for its metrics."""
        tally = self._sampled(variables, shown=False)
        summary = self._summary(tally)
        passes = {f"pass_at_{row['k']}": row["mean"] for row in summary["pass_at_k"]}
        by_name = {
            f"{metric_name(name)}/mean": float(np.mean(paid))
            for name, paid in tally.paid.items()
            if name != "total"
        }
        found = {
            **passes,
            "reward": summary["reward"],
            **by_name,
            "completions/mean_length": summary["completion_length"],
            "completions/clipped_ratio": summary["truncated"],
        }
        return {f"validation_{name}": value for name, value in found.items()}

    def _summary(self, tally: Tally) -> dict:
        evaluate = self._evaluate
        ks = list(evaluate.ks) or powers_of_two(evaluate.samples)
        table = pass_at_k_table(np.asarray(tally.solved_PG), ks, evaluate.bootstrap, seed=0)
        means = {name: float(np.mean(values)) for name, values in tally.paid.items()}
        return {
            "pass_at_k": rows_of(table),
            "success": {"reward": evaluate.reward, "least": evaluate.success},
            "split": evaluate.split,
            "problems": len(self.problems),
            "left_out": self.left_out,
            "samples": evaluate.samples,
            "format": means["format"],
            "reward": means.pop("total"),
            **{f"{name.rpartition(':')[2]}_reward": mean for name, mean in means.items()},
            "completion_length": float(np.mean(tally.lengths)),
            "truncated": float(np.mean(tally.truncated)),
        }
