"""What a row of the table is, and the algorithm that it becomes with its options.

loss = - aggregate(weights * surrogate(ratio, advantage)) + coefficient * aggregate(term) + ...
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rl.algorithms.aggregations import Aggregation, sequence_mean
from rl.algorithms.experience import Advantage
from rl.algorithms.options import Options
from rl.algorithms.outcomes import group_zscore
from rl.algorithms.ratios import token
from rl.algorithms.selections import Selection
from rl.algorithms.surrogates import Surrogate, clipped
from rl.algorithms.tokens import PerToken, needs_of

COLUMNS = ("advantage", "ratio", "surrogate", "aggregate", "selection")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a paper, as functions of their options.

    Attributes:
      paper: its name, arXiv number and equations.
      formula: what is maximised, in plain text; a line each.
      advantage: options -> from the experience of a step to an advantage of each token.
      ratio: options -> of the policy to the one that sampled.
      surrogate: options -> what is maximised in place of the return.
      aggregate: options -> from a value per token to one number.
      selection: options -> tokens that are singled out in an update; None singles out none.
      options: values where they are not the functions' own, or those of `Options`.
      loop: fields of the config's section reinforce that the row sets.
    """

    paper: str
    formula: str
    advantage: Callable[..., Advantage] = group_zscore
    ratio: Callable[..., PerToken] = token
    surrogate: Callable[..., Surrogate] = clipped
    aggregate: Callable[..., Aggregation] = sequence_mean
    selection: Callable[..., Selection] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loop: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row with all its options given: what the objective and the loop call.

    Attributes:
      name: the row's.
      advantage, ratio, surrogate, aggregate, selection: the functions, see `Row`.
      options: what may be added to any row.
      loop: fields of the config's section reinforce that it sets.
    """

    name: str
    advantage: Advantage
    ratio: PerToken
    surrogate: Surrogate
    aggregate: Aggregation
    selection: Selection | None
    options: Options
    loop: Mapping[str, Any] = dataclasses.field(hash=False)

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed beside log-probs and rewards, of `rl.algorithms.tokens.NEEDS`."""
        functions = (self.advantage, self.ratio, self.surrogate, self.aggregate, self.selection)
        return self.options.needs.union(*(needs_of(function) for function in functions))
