"""Short word problems of addition, subtraction and, on request, multiplication.

They are simple enough for a model that trains in minutes on one CPU:

    question   A zoo has 7 birds. 5 more arrive. 3 leave. How many birds now?
    trace      7+5=12;12-3=9
    answer     9
"""

import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from data.tasks.problem import Problem
from errors import UserError


class Context(NamedTuple):
    """A place where things come and go.

    In its sentences {who} stands for a name, {what} for the things and {n} for a number.

    Attributes:
      start: the first sentence, with the number there is at the beginning.
      what: names of the things, in the plural.
      more: sentences that add a number of things.
      fewer: sentences that take a number of things away.
      aside: a sentence whose number does not matter to the question.
    """

    start: str
    what: tuple[str, ...]
    more: tuple[str, ...]
    fewer: tuple[str, ...]
    aside: str


NAMES = ("Ann", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Ned", "Sam", "Tom")
CONTEXTS = (
    Context(
        start="{who} has {n} {what}.",
        what=("pens", "coins", "cards", "hats"),
        more=("{who} buys {n} more.", "{who} finds {n}."),
        fewer=("{who} sells {n}.", "{who} loses {n}."),
        aside="{who} is {n}.",
    ),
    Context(
        start="A zoo has {n} {what}.",
        what=("lions", "birds", "bears", "seals"),
        more=("{n} more arrive.", "{n} are born."),
        fewer=("{n} leave.", "{n} are sold."),
        aside="It opens at {n}.",
    ),
    Context(
        start="A class has {n} {what}.",
        what=("kids", "boys", "girls"),
        more=("{n} more join.", "{n} come in."),
        fewer=("{n} go home.", "{n} leave."),
        aside="It has {n} desks.",
    ),
    Context(
        start="A garden has {n} {what}.",
        what=("roses", "trees", "herbs"),
        more=("{n} more grow.", "{n} are planted."),
        fewer=("{n} die.", "{n} are cut."),
        aside="It has {n} gates.",
    ),
    Context(
        start="A bus has {n} {what}.",
        what=("men", "people", "women"),
        more=("{n} get on.", "{n} more sit down."),
        fewer=("{n} get off.", "{n} walk away."),
        aside="It is bus {n}.",
    ),
    Context(
        start="{who} bakes {n} {what}.",
        what=("cakes", "pies", "rolls"),
        more=("{who} bakes {n} more.", "{who} gets {n}."),
        fewer=("{who} eats {n}.", "{who} burns {n}."),
        aside="It takes {n} hours.",
    ),
    Context(
        start="A shop has {n} {what}.",
        what=("books", "lamps", "cups"),
        more=("It buys {n}.", "{n} more come in."),
        fewer=("It sells {n}.", "{n} break."),
        aside="It has {n} rooms.",
    ),
    Context(
        start="A farm has {n} {what}.",
        what=("cows", "pigs", "hens"),
        more=("{n} more are born.", "It buys {n}."),
        fewer=("It sells {n}.", "{n} run off."),
        aside="It has {n} fields.",
    ),
)
MOST_OPS, MOST_VALUE = 1_000, 10**9
# Sentences of a multiplication, by factor.
TIMES = {2: "Then the number doubles.", 3: "Then the number triples."}


class Step(NamedTuple):
    """One line of a trace: left operator right = result."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


@dataclass(frozen=True)
class Arithmetic:
    """The task "arithmetic"; its fields are its parameters.

    Attributes:
      min_ops: fewest steps of a problem.
      max_ops: most steps of a problem.
      max_value: upper bound of every number and every intermediate result; the lower one is 0.
      contexts: number of `CONTEXTS` to use, from the first on; 0 uses all.
      distractors: number of sentences in a problem whose number does not matter.
      multiply: 1 lets numbers double and triple where `max_value` allows it, 0 does not.

    Raises:
      UserError: a field is out of its range.
    """

    name: ClassVar[str] = "arithmetic"

    min_ops: int = 2
    max_ops: int = 3
    max_value: int = 20
    contexts: int = 0
    distractors: int = 0
    multiply: int = 0

    def __post_init__(self):
        if not 1 <= self.min_ops <= self.max_ops <= MOST_OPS:
            raise UserError(
                f"min_ops = {self.min_ops}, max_ops = {self.max_ops}: "
                f"must be 1 <= min_ops <= max_ops <= {MOST_OPS}"
            )
        if not 4 <= self.max_value <= MOST_VALUE:
            raise UserError(f"max_value = {self.max_value}: must be at least 4, at most 10^9")
        if not 0 <= self.contexts <= len(CONTEXTS):
            raise UserError(
                f"contexts = {self.contexts}: must be between 0 (all) and {len(CONTEXTS)}"
            )
        if not 0 <= self.distractors <= 4:
            raise UserError(f"distractors = {self.distractors}: must be between 0 and 4")
        if self.multiply not in (0, 1):
            raise UserError(f"multiply = {self.multiply}: must be 0 or 1")

    def problem(self, rng: random.Random) -> Problem:
        """Makes one problem, decided by `rng` alone."""
        steps = self._steps(rng, rng.randint(self.min_ops, self.max_ops))
        context = rng.choice(CONTEXTS[: self.contexts or None])
        words = {"who": rng.choice(NAMES), "what": rng.choice(context.what)}
        sentences = [context.start.format(n=steps[0].left, **words)]
        for step in steps:
            sentence = (
                TIMES[step.right]
                if step.operator == "*"
                else rng.choice(context.more if step.operator == "+" else context.fewer)
            )
            sentences.append(sentence.format(n=step.right, **words))
        for _ in range(self.distractors):
            sentences.insert(
                rng.randint(1, len(sentences)),
                context.aside.format(n=rng.randint(2, self.max_value), **words),
            )
        sentences.append(f"How many {words['what']} now?")
        return Problem(" ".join(sentences), str(steps[-1].result), write_trace(steps), len(steps))

    def _steps(self, rng: random.Random, ops: int) -> list[Step]:
        """Draws a chain of steps.

        Every number that the question names is 2 or more, so that its noun is always a plural.
        """
        value = rng.randint(2, self.max_value)
        steps = []
        for _ in range(ops):
            bounds = {"+": self.max_value - value, "-": value}
            if self.multiply and value > 0:
                bounds["*"] = min(max(TIMES), self.max_value // value)
            operator = rng.choice([operator for operator, bound in bounds.items() if bound >= 2])
            right = rng.randint(2, bounds[operator])
            steps.append(Step(value, operator, right, apply(value, operator, right)))
            value = steps[-1].result
        return steps


def apply(left: int, operator: str, right: int) -> int:
    """Computes one step; the operator is "+", "-" or "*"."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def write_trace(steps: list[Step]) -> str:
    """Writes steps as a trace, such as "7+5=12;12-3=9"."""
    return ";".join(str(step) for step in steps)
