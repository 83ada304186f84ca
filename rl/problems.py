"""The problems of a run: which there are, whether their prompts fit, and whose turn is when."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from data.chat import encode_prompt
from data.documents import Split
from data.tasks.draw import draw_problems, training_problems
from data.tasks.problem import Problem
from data.tokenizer import Tokenizer
from errors import UserError
from rl.config import SamplingConfig
from train.progress import Progress

GENERATED = 4_096  # distinct training problems that a run draws of a task that generates them
WORTH_A_BAR = 20_000  # prompts whose measuring is shown: fewer take a moment


class ProblemSet(NamedTuple):
    """Problems whose prompts fit, and how many were left out because theirs do not."""

    problems: Sequence[Problem]
    left_out: int


def problems_to_train(
    task: str, sampling: SamplingConfig, tokenizer: Tokenizer, template: str, seed: int
) -> ProblemSet:
    """Returns all problems that a run learns from, and says on standard output how many they are.

    Raises UserError as `that_fit` does, or if the task is wrong.
    """
    found = training_problems(task, GENERATED, seed)
    fitting = that_fit(found, sampling, tokenizer, template, "train")
    if jax.process_index() == 0:
        count = f"{len(fitting.problems):,} to train on"
        print(f"{'problems':<12}{count}{_words_of_left_out(fitting)}", flush=True)
    return fitting


def problems_to_evaluate(
    task: str,
    count: int,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    template: str,
    split: str = "validation",
    seed: int = 0,
) -> ProblemSet:
    """Returns at most `count` problems of a split, "validation" or "train".

    The held-out ones are the same in every run; those to train on are the first that a run with
    this seed has.

    Raises UserError as `that_fit` does, or if the task is wrong.
    """
    if split == "validation":
        found = draw_problems(task, "validation", count, seed=0)
        return that_fit(found, sampling, tokenizer, template, "validation")
    found = training_problems(task, GENERATED, seed)
    fitting = that_fit(found, sampling, tokenizer, template, "train")
    return ProblemSet(fitting.problems[:count], fitting.left_out)


def that_fit(
    problems: Sequence[Problem],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    template: str,
    split: Split,
) -> ProblemSet:
    """Returns the problems whose prompts have at most sampling.max_prompt_tokens tokens.

    Raises:
      UserError: one is longer and sampling.filter_overlong_prompts is off, or all are longer.
    """
    most = sampling.max_prompt_tokens
    lengths = _prompt_lengths(problems, tokenizer, template)
    fitting = [problem for problem, length in zip(problems, lengths, strict=True) if length <= most]
    left_out, longest = len(problems) - len(fitting), max(lengths)
    if left_out and not (sampling.filter_overlong_prompts and fitting):
        raise UserError(
            f"sampling.max_prompt_tokens = {most}: {left_out:,} of {len(problems):,} prompts for "
            f"{split} are longer, the longest has {longest:,} tokens; raise it to at least that"
            + (", or set sampling.filter_overlong_prompts to leave them out" if fitting else "")
        )
    return ProblemSet(fitting, left_out)


def _prompt_lengths(problems: Sequence[Problem], tokenizer: Tokenizer, template: str) -> list[int]:
    if len(problems) < WORTH_A_BAR:
        return [len(prompt_of(problem, tokenizer, template)) for problem in problems]
    lengths = []
    with Progress(len(problems), "measuring prompts", unit="tokens") as progress:
        for done, problem in enumerate(problems, 1):
            lengths.append(len(prompt_of(problem, tokenizer, template)))
            progress.update(done, {}, lengths[-1])
    return lengths


def prompt_of(problem: Problem, tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the ids of a problem's prompt, up to where the assistant begins to write.

    Raises UserError, with the problem's id, if the template cannot write it.
    """
    try:
        return encode_prompt(problem.messages, tokenizer, template)
    except UserError as error:
        raise UserError(f"problem {problem.id}: {error}") from error


def _words_of_left_out(found: ProblemSet) -> str:
    if not found.left_out:
        return ""
    return f"; {found.left_out:,} left out, longer than sampling.max_prompt_tokens"


def problem_of_draw(number: int, problems: Sequence[Problem], seed: int) -> Problem:
    """Returns the problem that is drawn, of numbers from 0 on: each epoch has its own order.

    It depends on the number alone, so that a run resumes with the ones it would have had.
    """
    return problems[place_of_draw(number, len(problems), seed)]


def place_of_draw(number: int, count: int, seed: int) -> int:
    """Returns the place of that problem among so many."""
    epoch, place = divmod(number, count)
    return int(_order(seed, epoch, count)[place])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
