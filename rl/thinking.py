"""Accuracy against a forced length of thought (budget forcing, arXiv 2501.19393).

A completion thinks for at most so many tokens: a longer thought is cut by a phrase after which it
answers. One that ends sooner is told to wait, as often as is asked for, and then may end
(`rl.halting.ThinkingBudget`); how long thoughts were in the end is measured.
"""

import dataclasses
from typing import Any

import numpy as np
from jax import Array

from rl.budgets import budget_of, check_thinks, most_tokens
from rl.config import EvaluateConfig, ReinforceConfig, SamplingConfig
from rl.evaluate import bootstrap
from rl.generate import Completion, Generator
from rl.halting import ThinkingBudget
from rl.problem_outcomes import as_object
from rl.problems import ProblemSet, prompt_of
from rl.request import Prompt, keys_of
from rl.rewards import total_reward
from rl.trajectory import Role, Trajectory
from train.setup import Setup


def accuracy_by_thinking(
    setup: Setup,
    sampling: SamplingConfig,
    evaluate: EvaluateConfig,
    reinforce: ReinforceConfig,
    template: str,
    variables: dict,
    problems: ProblemSet,
    key: Array,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples completions with each length of thought, all in one engine.

    Their random keys are those of an evaluation without a budget, the same for each length.

    Returns:
      (rows, samples). A row has the budget; "accuracy", the mean over problems of the share of
      completions that are successes, with its interval; the means of "thinking_tokens", which were
      sampled before the thought's end, and of "tokens", all that were sampled; "cut", the share of
      completions whose thought was cut; and "waited", how often one was told to wait, on average.
      Samples are lines as samples.jsonl has them, with the budget.

    Raises:
      UserError: the template has no thought.
    """
    tokenizer, G = setup.tokenizer, evaluate.samples
    check_thinks(tokenizer, template, f"evaluate.thinking = {evaluate.thinking}", "leave it empty")
    budgets = [budget_of(tokenizer, most, evaluate) for most in evaluate.thinking]
    room = max(most_tokens(budget) for budget in budgets)
    generate = Generator(
        setup,
        dataclasses.replace(sampling, max_new_tokens=room, thinking=0),
        template,
        completions=len(budgets) * len(problems.problems) * G,
        group_size=G,
    )
    keys_PG2 = keys_of(key, range(len(problems.problems)), G)
    asked: list[Prompt] = []
    for budget in budgets:
        for problem, keys_G2 in zip(problems.problems, keys_PG2, strict=True):
            ids = prompt_of(problem, tokenizer, template)
            asked.append(budget.prompt(ids, keys_G2, group=len(asked)))
    ended: dict[int, list[Trajectory]] = {}
    with generate.engine.loaded(variables, recording=False):
        for trajectory in generate.engine.run(asked):
            ended.setdefault(trajectory.group, []).append(trajectory)
    rows, samples = [], []
    for number, budget in enumerate(budgets):
        correct_PG, measured = [], []
        for place, problem in enumerate(problems.problems):
            trajectories = ended[number * len(problems.problems) + place]
            trajectories.sort(key=lambda each: each.sample)
            completions = list(map(generate.completion, trajectories))
            paid = [
                total_reward(each.text, problem, {evaluate.reward: 1.0})[0] for each in completions
            ]
            correct_PG.append([reward >= evaluate.success for reward in paid])
            measured += [_measured(each, budget) for each in completions]
            samples += [
                {
                    "thinking": budget.most_tokens,
                    "id": problem.id,
                    "prompt": problem.question,
                    "completion": completion.text,
                    "answer": problem.answer,
                    "reward": reward,
                }
                for completion, reward in zip(completions, paid, strict=True)
            ]
        accuracy = bootstrap(np.mean(correct_PG, axis=1), evaluate.bootstrap, seed=0)
        names = ("thinking_tokens", "tokens", "cut", "waited")
        means = dict(zip(names, np.mean(measured, axis=0).tolist(), strict=True))
        rows.append(
            {"thinking": budget.most_tokens, "accuracy": as_object(accuracy), "samples": G} | means
        )
    return rows, samples


def _measured(completion: Completion, budget: ThinkingBudget) -> tuple[int, int, bool, int]:
    """Returns tokens of its thought and in all, whether that was cut, and how often it waited.

    A completion that ends its turn within its thought has no answer, and all its tokens are of it.
    """
    trajectory = completion.trajectory
    start = trajectory.prompt_length
    sampled_T = trajectory.sampled_T[start:]
    ids = trajectory.completion.tolist()
    injected = trajectory.roles_T[start:] == Role.INJECTED
    begins = np.flatnonzero(np.diff(np.append(0, injected)) == 1)
    cut_at = len(budget.tokenizer.encode(budget.interruption))
    lengths = [int(np.argmin(np.append(injected[first:], False))) for first in begins]
    cut = bool(lengths) and lengths[-1] == cut_at
    end = int(begins[-1]) if cut else budget.end_of_thought(ids)
    return int(sampled_T[:end].sum()), completion.length, cut, len(lengths) - cut
