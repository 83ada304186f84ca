"""What is known of the problems of a run before it begins, and which of them it leaves out.

Another model, or the one that reinforcement starts from, has tried them: how often it solved each
says how hard that is, and whether it was right without a thought says that its answer can be
guessed (Kimi k1.5, arXiv 2501.12599, section 2.1).
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import numpy as np

from data.tasks.problem import Problem
from errors import UserError
from rl.config import ReinforceConfig


class Tries(NamedTuple):
    """What became of a problem.

    tried, solved: completions of it, and those of them that solved it.
    guessed: whether one did with next to no thought; None where that was not asked.
    """

    tried: int
    solved: int
    guessed: bool | None = None

    @property
    def pass_rate(self) -> float:
        """The share that solved it."""
        return self.solved / self.tried


class PassRates:
    """Tries of problems, which are told apart by their id and question.

    The id of a problem of a file is its place in there, which another problem may have by now.

    Args:
      origin: where they were measured.
      tries: (id, digest of the question) -> its tries.
      thought: tokens of thought of those that guess.
    """

    def __init__(self, origin: str, tries: Mapping[tuple[str, str], Tries], thought: int = 0):
        self.origin, self.thought, self._tries = origin, thought, tries

    def of(self, problem: Problem) -> Tries | None:
        """Returns the tries of a problem; None where there are none."""
        return self._tries.get((problem.id, digest(problem.question)))

    def counts(self, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
        """Returns how often each problem was tried and solved, int64 [P] each; 0 of unknown."""
        found = [self.of(problem) or Tries(0, 0) for problem in problems]
        tried_P, solved_P = (np.array([each[i] for each in found], np.int64) for i in (0, 1))
        return tried_P, solved_P

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        lines = [[*key, *tries] for key, tries in self._tries.items()]
        return {"from": self.origin, "thought": self.thought, "problems": lines}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "PassRates":
        """Returns what `as_json` made JSON of. Raises KeyError, TypeError or ValueError."""
        tries = {(str(i), str(q)): Tries(*counts) for i, q, *counts in found["problems"]}
        return cls(str(found["from"]), tries, int(found["thought"]))


def digest(question: str) -> str:
    """Returns a few letters that tell a question from others."""
    return blake2b(question.encode("utf-8", "replace"), digest_size=8).hexdigest()


def problems_within(
    problems: Sequence[Problem], pass_rates: PassRates | None, config: ReinforceConfig
) -> Sequence[Problem]:
    """Returns the problems that a run learns from, by what is known of them.

    Those whose pass rate lies outside of `min_pass_rate` and `max_pass_rate` are left out, and with
    `guessed` = "left_out" those that were guessed; what was not measured stays. Says on standard
    output how many are left out by which rule, the first of those that one breaks.

    Raises:
      UserError: none of the problems was measured, or none is left.
    """
    if pass_rates is None:
        return problems
    place = f"reinforce.pass_rates_from = {pass_rates.origin!r}"
    known, left, thought = 0, [], f"{pass_rates.thought} token{'s' * (pass_rates.thought != 1)}"
    rules = {
        f"with a pass rate below {config.min_pass_rate:g}": 0,
        f"with a pass rate above {config.max_pass_rate:g}": 0,
        f"guessed in {config.guess_attempts} attempts, thinking {thought}": 0,
    }
    for problem in problems:
        tries = pass_rates.of(problem)
        known += tries is not None
        broken = tries and (
            tries.pass_rate < config.min_pass_rate,
            tries.pass_rate > config.max_pass_rate,
            config.guessed == "left_out" and bool(tries.guessed),
        )
        if broken and any(broken):
            rules[list(rules)[broken.index(True)]] += 1
        else:
            left.append(problem)
    if not known:
        raise UserError(
            f"{place}: none of the {len(problems):,} problems of reinforce.task = {config.task!r} "
            "was tried there; evaluate these with the same reinforce.task and seed, and "
            "--config.evaluate.split=train"
        )
    counted = ", ".join(f"{count:,} {rule}" for rule, count in rules.items() if count)
    if not left:
        raise UserError(f"{place}: leaves out all {len(problems):,} problems: {counted}")
    if jax.process_index() == 0:
        tried = f"{known:,} of {len(problems):,} problems in {pass_rates.origin}"
        kept = f"; left out {counted}; {len(left):,} to train on" if counted else ""
        print(f"{'pass rates':<12}{tried}{kept}", flush=True)
    return left
