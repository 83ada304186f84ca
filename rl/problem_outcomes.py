"""What became of each problem of an evaluation: a line of problems.jsonl, and what follows from it.

The class of a completion is its answer as the reward reads it: what stands in <answer> of a
completion that is well formed, numbers by value and texts by their words. All that an evaluation
says of votes, pass rates and difficulty follows from these lines, and two runs are compared by
theirs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.completions import parse_completion
from data.tasks.problem import Problem
from rl.config import EvaluateConfig
from rl.difficulty import by_own_difficulty, difficulty_of
from rl.evaluate import Interval, bootstrap, pass_at_k_table, wilson
from rl.generate import Completion
from rl.paired import powers_of_two
from rl.rewards.answer import normalise
from rl.voting import NO_ANSWER, cons_at_k_table


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A problem and what its G completions came to, in the order of their numbers.

    Attributes:
      id, question, answer: of the problem.
      temperature: that its completions were sampled at.
      difficulty: what the problem says of itself, None where it says nothing.
      prompt_tokens: the ids that the completions go on from.
      correct: 0 or 1, whether each is a success.
      rewards: what each earns of the reward that is counted.
      classes: the place of its answer in `answers`, NO_ANSWER where it has none.
      answers: each different answer, as the first that gave it wrote it.
      lengths: sampled tokens of each.
      truncated: 0 or 1, whether each was cut before its stop token.
      split: "validation" of a problem that is held out, or "train".
    """

    id: str
    question: str
    answer: str
    temperature: float
    difficulty: str | float | None
    prompt_tokens: Sequence[int]
    correct: Sequence[int]
    rewards: Sequence[float]
    classes: Sequence[int]
    answers: Sequence[str]
    lengths: Sequence[int]
    truncated: Sequence[int]
    split: str = "validation"

    @classmethod
    def of(
        cls,
        problem: Problem,
        completions: Sequence[Completion],
        rewards: Sequence[float],
        success: float,
        temperature: float,
        split: str = "validation",
    ) -> "Outcome":
        """Returns what became of a problem, given what each completion earns."""
        classes, answers = answer_classes([completion.text for completion in completions])
        trajectory = completions[0].trajectory
        return cls(
            id=problem.id,
            question=problem.question,
            answer=problem.answer,
            temperature=temperature,
            difficulty=difficulty_of(problem),
            prompt_tokens=trajectory.tokens_T[: trajectory.prompt_length].tolist(),
            correct=[int(reward >= success) for reward in rewards],
            rewards=list(map(float, rewards)),
            classes=classes,
            answers=answers,
            lengths=[completion.length for completion in completions],
            truncated=[int(completion.truncated) for completion in completions],
            split=split,
        )

    def as_record(self) -> dict[str, Any]:
        """Returns the line of problems.jsonl: first what it comes to, then each completion."""
        votes = np.bincount([name for name in self.classes if name != NO_ANSWER] or [0])
        majority, samples = int(np.argmax(votes)), len(self.correct)
        of_majority = [c for c, name in zip(self.correct, self.classes, strict=True)
                       if name == majority]  # fmt: skip
        low, high = wilson(sum(self.correct), samples)
        table = {
            "samples": samples,
            "solved": sum(self.correct),
            "pass_rate": sum(self.correct) / samples,
            "pass_rate_low": low,
            "pass_rate_high": high,
            "reward": float(np.mean(self.rewards)),
            "majority_answer": self.answers[majority] if self.answers else None,
            "majority_votes": len(of_majority),
            "majority_correct": float(np.mean(of_majority)) if of_majority else 0.0,
            "no_answer": sum(name == NO_ANSWER for name in self.classes),
            "completion_length": float(np.mean(self.lengths)),
            "cut": sum(self.truncated),
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        first = ("id", "question", "answer", "split", "temperature", "difficulty")
        return {name: fields.pop(name) for name in first} | table | fields

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Outcome":
        """Returns the outcome of a line. Raises KeyError or ValueError for one that is none.

        A line from before there were splits is of a problem that is held out.
        """
        record = {"split": "validation", **record}
        found = cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})
        per_completion = (found.rewards, found.classes, found.lengths, found.truncated)
        if not found.correct or any(len(one) != len(found.correct) for one in per_completion):
            raise ValueError("its lists are not of one length")
        return found


def answer_classes(texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """Returns the class of each completion, NO_ANSWER where it has no answer, and their answers."""
    places: dict[Any, int] = {}
    classes, answers = [], []
    for text in texts:
        written = parse_completion(text).answer
        if not written:
            classes.append(NO_ANSWER)
            continue
        answer = normalise(written)
        if answer not in places:
            places[answer] = len(answers)
            answers.append(written)
        classes.append(places[answer])
    return classes, answers


def figures(outcomes: Sequence[Outcome], evaluate: EvaluateConfig) -> dict[str, Any]:
    """Returns pass@k, cons@k, mean@n and pass@1 by difficulty, each with its 95 % interval.

    mean@n is the mean over a problem's n completions of the reward that is counted, which is pass@1
    where that reward is 0 or 1 and a success is 1.
    """
    samples, resamples = len(outcomes[0].correct), evaluate.bootstrap
    ks = list(evaluate.ks) or powers_of_two(samples)
    correct_PG = np.array([outcome.correct for outcome in outcomes])
    classes_PG = [np.array(outcome.classes) for outcome in outcomes]
    mean_P = np.array([np.mean(outcome.rewards) for outcome in outcomes])
    passes = pass_at_k_table(correct_PG, ks, resamples, seed=0)
    ties = evaluate.consensus_ties
    votes = cons_at_k_table(classes_PG, list(correct_PG), ks, resamples, 0, ties)
    groups = by_own_difficulty([outcome.difficulty for outcome in outcomes])
    return {
        "pass_at_k": rows_of(passes),
        "cons_at_k": rows_of(votes),
        "consensus_ties": ties,
        "mean_at_n": {"n": samples} | as_object(bootstrap(mean_P, resamples, 0)),
        "no_answer": float(np.mean([np.equal(c, NO_ANSWER).mean() for c in classes_PG])),
        "by_difficulty": [
            {"difficulty": group.name, "problems": len(group.places)}
            | _of_group(
                correct_PG[group.places],
                [classes_PG[place] for place in group.places],
                ks,
                evaluate,
            )
            for group in groups
        ],
    }


def _of_group(
    correct_PG: np.ndarray,
    classes_PG: Sequence[np.ndarray],
    ks: Sequence[int],
    evaluate: EvaluateConfig,
) -> dict[str, dict[str, float]]:
    """Returns pass@k of some problems at the ends of the table, and cons@k at its last k."""
    resamples, last = evaluate.bootstrap, ks[-1]
    passes = pass_at_k_table(correct_PG, sorted({ks[0], last}), resamples, seed=0)
    votes = cons_at_k_table(
        classes_PG, list(correct_PG), [last], resamples, 0, evaluate.consensus_ties
    )
    found = {f"pass@{k}": as_object(interval) for k, interval in passes.items()}
    return found | {f"cons@{last}": as_object(votes[last])}


def rows_of(table: Mapping[int, Interval]) -> list[dict[str, float]]:
    """Returns a table of k as JSON has it, [{"k", "mean", "low", "high"}]."""
    return [{"k": int(k)} | as_object(interval) for k, interval in table.items()]


def as_object(interval: Interval) -> dict[str, float]:
    """Returns an interval as JSON has it."""
    return {name: float(value) for name, value in interval._asdict().items()}
