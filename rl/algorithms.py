"""The table of algorithms: one row for each paper.

A row says how rewards become advantages, what is maximised, how much each token counts, and how far
the policy may go:

    loss = - aggregate(surrogate(ratio, advantage)) + coefficient * aggregate(divergence)

Reading down a column compares papers. A new paper is a new row, and a new function only where it
brings a new idea. What a paper does outside the loss (DAPO's dynamic sampling and overlong penalty,
the learning rate, the number of updates per rollout) is not in the row.
"""

import dataclasses
import difflib

from errors import UserError
from rl.advantages import Advantage, group_centred, group_zscore, leave_one_out
from rl.aggregations import Aggregation, mean_of_sequence_means, sum_over, token_mean
from rl.divergences import Divergence, k3, unbiased_k3
from rl.surrogates import Ratio, Surrogate, clipped, token_ratio


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row of the table.

    advantage: rewards_PG -> advantages_PG (rl/advantages.py).
    ratio: (logprobs_BT, old_logprobs_BT, mask_BT) -> ratio_BT (rl/surrogates.py).
    surrogate: (ratio_BT, advantages_BT) -> (objective_BT, clipped_BT) (rl/surrogates.py).
    aggregate: total(values_BT, sequences_BT) and weight(sequences_BT) (rl/aggregations.py).
    divergence: estimator(logprobs_BT, reference_logprobs_BT, ratio_BT) and coefficient
      (rl/divergences.py); None needs no reference model.
    """

    advantage: Advantage
    ratio: Ratio
    surrogate: Surrogate
    aggregate: Aggregation
    divergence: Divergence | None


def algorithms(max_completion: int) -> dict[str, Algorithm]:
    """Returns the table, for completions of at most `max_completion` tokens.

    A row whose paper has no divergence has one with coefficient 0. It is used when a config asks
    for a KL all the same.
    """
    kl_off_by_default = Divergence(unbiased_k3, coefficient=0.0)
    return {
        # GRPO, arXiv 2402.03300, eq. 3 and 4. The paper leaves ddof and eps open; these are the
        # ones in common use.
        "grpo": Algorithm(
            advantage=group_zscore(ddof=1, eps=1e-6),
            ratio=token_ratio,
            surrogate=clipped(low=0.2, high=0.2),
            aggregate=mean_of_sequence_means,
            divergence=Divergence(k3, coefficient=0.04),
        ),
        # Dr.GRPO, arXiv 2503.20783, section 3.2: no standard deviation, and instead of the length
        # a constant divisor, the longest completion that can be sampled.
        "dr_grpo": Algorithm(
            advantage=group_centred,
            ratio=token_ratio,
            surrogate=clipped(low=0.2, high=0.2),
            aggregate=sum_over(max_completion),
            divergence=kl_off_by_default,
        ),
        # DAPO, arXiv 2503.14476, eq. 8 and 10: clip-higher, and every token counts the same. Eq. 8
        # divides by the tokens of one prompt; this row, like the authors' code, by those of the
        # batch.
        "dapo": Algorithm(
            advantage=group_zscore(ddof=1, eps=1e-6),
            ratio=token_ratio,
            surrogate=clipped(low=0.2, high=0.28),
            aggregate=token_mean,
            divergence=kl_off_by_default,
        ),
        # RLOO, arXiv 2402.14740, token by token: the log-probability of a completion is a sum, so
        # the divisor is 1. On-policy, as in the paper, the clip never acts.
        "rloo": Algorithm(
            advantage=leave_one_out,
            ratio=token_ratio,
            surrogate=clipped(low=0.2, high=0.2),
            aggregate=sum_over(1),
            divergence=kl_off_by_default,
        ),
    }


ALGORITHMS = tuple(algorithms(max_completion=1))


def get_algorithm(name: str, *, max_completion: int, kl_weight: float = -1.0) -> Algorithm:
    """Returns the row `name`, with what a config decides filled in.

    Args:
      max_completion: tokens of the longest completion (sampling.max_new_tokens).
      kl_weight: coefficient of the divergence; -1 keeps the row's own. With 0, or a row's own of 0,
        the divergence is None and no reference model is needed.

    Raises:
      UserError: there is no such row.
    """
    if name not in ALGORITHMS:
        raise UserError(f"reinforce.algorithm = {name!r}: {_suggestion(name)}")
    row = algorithms(max_completion)[name]
    divergence = row.divergence
    if divergence is not None and kl_weight != -1:
        divergence = dataclasses.replace(divergence, coefficient=kl_weight)
    if divergence is not None and divergence.coefficient == 0:
        divergence = None
    return dataclasses.replace(row, divergence=divergence)


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALGORITHMS, n=1)
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"{question}(rows of rl/algorithms.py: {', '.join(ALGORITHMS)})"
