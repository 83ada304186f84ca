"""The part of an evaluation that is about problems: at several temperatures, thinking so long.

problems.jsonl   a problem a line: solved, samples, pass rate, majority answer, and what each
                 completion came to (rl/problem_outcomes.py)
samples.jsonl    every prompt, completion and reward
thinking.jsonl   the same of completions whose thought was forced to a length
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiment.schema import Config
from rl.budgets import check_thinks
from rl.config import SamplingConfig
from rl.generate import Generator
from rl.problems import problems_to_evaluate
from rl.reasoning import Evaluated, ReasoningEvaluation
from rl.thinking import accuracy_by_thinking
from train.setup import Setup

# Figures of each temperature.
OF_GRID = (
    "pass_at_k",
    "cons_at_k",
    "mean_at_n",
    "no_answer",
    "by_difficulty",
    "reward",
    "completion_length",
    "truncated",
)


class Solved(NamedTuple):
    """What evaluation.json has of problems, and the lines of the files beside it, by name."""

    result: dict[str, Any]
    files: dict[str, Sequence[Mapping[str, Any]]]


def solve(config: Config, setup: Setup, variables: dict) -> Solved:
    """Evaluates problems at each temperature, and with each length of thought.

    The figures of the first temperature stand by themselves; with several, "temperatures" has those
    of each. The temperature is a constant of the compiled program that samples, so another one
    compiles that program anew, and no other.

    Raises UserError as `ReasoningEvaluation` and `accuracy_by_thinking` do.
    """
    evaluate, template = config.evaluate, config.data.chat_template
    if evaluate.thinking:  # before anything is sampled
        check_thinks(
            setup.tokenizer, template, f"evaluate.thinking = {evaluate.thinking}", "leave it empty"
        )
    temperatures = list(evaluate.temperatures) or [config.sampling.temperature]
    found: dict[float, Evaluated] = {}
    for temperature in temperatures:
        sampling = dataclasses.replace(config.sampling, temperature=temperature)
        if len(temperatures) > 1 and jax.process_index() == 0:
            print(f"{'temperature':<12}{temperature:g}", flush=True)
        found[temperature] = _evaluated(config, setup, sampling, variables)
    first = found[temperatures[0]]
    result = first.summary | {"temperature": temperatures[0]}
    if len(temperatures) > 1:
        result["temperatures"] = [
            {"temperature": temperature} | {name: each.summary[name] for name in OF_GRID}
            for temperature, each in found.items()
        ]
    files: dict[str, Sequence[Mapping[str, Any]]] = {
        "samples.jsonl": [line for each in found.values() for line in each.samples],
        "problems.jsonl": [line.as_record() for each in found.values() for line in each.outcomes],
    }
    if evaluate.thinking:
        sampling = dataclasses.replace(config.sampling, temperature=temperatures[0])
        problems = problems_to_evaluate(
            config.reinforce.task,
            evaluate.problems,
            sampling,
            setup.tokenizer,
            template,
            evaluate.split,
            config.seed,
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 2)  # as ReasoningEvaluation has
        result["thinking"], files["thinking.jsonl"] = accuracy_by_thinking(
            setup, sampling, evaluate, config.reinforce, template, variables, problems, key
        )
    return Solved(result, files)


def _evaluated(
    config: Config, setup: Setup, sampling: SamplingConfig, variables: dict
) -> Evaluated:
    samples = config.evaluate.samples
    generate = Generator(
        setup,
        sampling,
        config.data.chat_template,
        completions=config.evaluate.problems * samples,
        group_size=samples,
    )
    evaluation = ReasoningEvaluation(
        setup, config.evaluate, config.reinforce, generate, config.seed
    )
    return evaluation(variables)


def print_solved(result: Mapping[str, Any]) -> None:
    """Prints what evaluation.json has of problems, a line a figure, with 95 % intervals."""
    which = {"train": "training problems", "validation": "held-out problems"}[result["split"]]
    print(f"{result['problems']:,} {which}, {result['samples']:,} completions of each")
    if result.get("left_out"):
        print(f"{result['left_out']:,} problems left out, longer than sampling.max_prompt_tokens")
    for grid in result.get("temperatures") or [result]:
        if "temperatures" in result:
            print(f"temperature {grid['temperature']:g}")
        for name, table in (("pass", "pass_at_k"), ("cons", "cons_at_k")):
            for row in grid[table]:
                print(f"{name}@{row['k']:<4} {_words(row)}")
        mean = grid["mean_at_n"]
        print(f"mean@{mean['n']:<4} {_words(mean)}")
    for row in result["by_difficulty"]:
        shown = ", ".join(f"{name} {_words(row[name])}" for name in row if "@" in name)
        print(f"difficulty {row['difficulty']} ({row['problems']:,} problems): {shown}")
    for row in result.get("thinking", []):
        tokens = f"{row['thinking_tokens']:.1f} tokens of thought, {row['tokens']:.1f} in all"
        print(f"thinking {row['thinking']:<5} {_words(row['accuracy'])}  {tokens}")


def _words(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f}  ({interval['low']:.3f} to {interval['high']:.3f})"
