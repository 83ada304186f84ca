"""Measures how many held-out problems the policy solves: completions, rewards and pass@k."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from data.tasks.draw import draw_problems
from data.tasks.problem import Problem
from rl.config import EvaluateConfig, SamplingConfig
from rl.evaluate import pass_at_k_table
from rl.generate import Generation, Generator
from rl.rewards import total_reward
from train.progress import Progress
from train.setup import Setup

ROWS = 256  # completions sampled at a time


@dataclasses.dataclass
class Tally:
    """Completions of problems, `samples` of each, and how right they are.

    Attributes:
      correct_PG: 1.0 for each of G completions of P problems that is right.
      formatted: for each completion, 1.0 where its format is right.
      lengths: tokens of each completion, those that fill up a batch included.
      records: the lines of samples.jsonl.
    """

    samples: int
    correct_PG: list[list[float]] = dataclasses.field(default_factory=list)
    formatted: list[float] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    records: list[dict] = dataclasses.field(default_factory=list)

    def add(self, problems: Sequence[Problem], generation: Generation) -> None:
        """Adds the completions of `problems`; what `generation` has beyond them fills it up."""
        for row, problem in enumerate(problems):
            texts = generation.texts[row * self.samples : (row + 1) * self.samples]
            rewards = [
                total_reward(text, problem.answer, {"answer": 1.0, "format": 1.0})[1]
                for text in texts
            ]
            self.correct_PG.append([reward["answer"] for reward in rewards])
            self.formatted.extend(reward["format"] for reward in rewards)
            self.records.extend(
                {
                    "prompt": problem.question,
                    "completion": text,
                    "answer": problem.answer,
                    "reward": reward["answer"],
                    "format": reward["format"],
                }
                for text, reward in zip(texts, rewards, strict=True)
            )
        self.lengths.extend(generation.mask_BC.sum(axis=1).tolist())


def evaluate_reasoning(
    setup: Setup,
    variables: dict,
    evaluate: EvaluateConfig,
    sampling: SamplingConfig,
    *,
    task: str,
    template: str,
    seed: int,
) -> tuple[dict, list[dict]]:
    """Samples completions of held-out problems and counts the right ones.

    Returns:
      ("pass_at_k" for k = 1, 2, 4, ... up to the completions of a problem, each with its interval;
      and the means of format and length), (every prompt, completion and reward).
    """
    problems = draw_problems(task, "validation", evaluate.problems, seed=0)
    generate = Generator(setup, sampling, template, evaluate.samples)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    at_once = max(ROWS // evaluate.samples, 1)
    at_once += -at_once % setup.mesh.size
    tally = Tally(evaluate.samples)
    with Progress(len(problems), "evaluate", unit="tokens") as progress:
        for first in range(0, len(problems), at_once):
            chosen = problems[first : first + at_once]
            # The last batch is filled up: one shape is one compilation.
            padded = chosen + [chosen[-1]] * (at_once - len(chosen))
            generation = generate(variables, padded, jax.random.fold_in(key, first))
            tally.add(chosen, generation)
            done, tokens = min(first + at_once, len(problems)), int(generation.mask_BC.sum())
            progress.update(done, {"pass@1": np.mean(tally.correct_PG)}, tokens)
    ks = [k for k in (2**i for i in range(20)) if k < evaluate.samples] + [evaluate.samples]
    table = pass_at_k_table(np.asarray(tally.correct_PG), ks, evaluate.bootstrap, seed=0)
    return {
        "pass_at_k": [
            {"k": k, "mean": float(i.mean), "low": float(i.low), "high": float(i.high)}
            for k, i in table.items()
        ],
        "problems": len(problems),
        "samples": evaluate.samples,
        "format": float(np.mean(tally.formatted)),
        "completion_length": float(np.mean(tally.lengths)),
    }, tally.records
