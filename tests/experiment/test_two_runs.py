"""Two runs of which the truth is known: what their comparison says."""

import numpy as np
import pytest

from experiment.two_runs import comparison
from rl.config import EvaluateConfig
from rl.problem_outcomes import Outcome
from rl.voting import NO_ANSWER

EVALUATE = EvaluateConfig(bootstrap=200)


def outcomes(rate_P, samples: int, seed: int) -> list[Outcome]:
    """Problems that are solved with these chances; a wrong completion has an answer of its own."""
    rng = np.random.default_rng(seed)
    made = []
    for number, rate in enumerate(rate_P):
        correct = (rng.random(samples) < rate).astype(int).tolist()
        classes = [0 if right else NO_ANSWER for right in correct]
        made.append(
            Outcome(
                id=str(number),
                question="",
                answer="",
                temperature=1.0,
                difficulty=None,
                prompt_tokens=[1],
                correct=correct,
                rewards=list(map(float, correct)),
                classes=classes,
                answers=["right"],
                lengths=[1] * samples,
                truncated=[0] * samples,
            )
        )
    return made


def test_luck_is_not_taken_for_difficulty():
    """All problems are alike and so are both runs: there is no gain, on those on which the base was
    unlucky least of all. Grouped by the completions that are compared, the gain of those solved at
    most twice in eight would be 0.5 - 0.2. 900 problems of 8 completions have standard errors of
    at most 0.04 in a group of a tenth of them.
    """
    found = comparison(outcomes([0.5] * 900, 8, 0), outcomes([0.5] * 900, 8, 1), EVALUATE)
    groups = found["by_pass_rate"]
    assert groups[0]["difficulty"] == "never" and len(groups) >= 5
    assert sum(group["problems"] for group in groups) == 900
    for group in groups:
        assert abs(group["mean"]) < 0.1, group


def test_a_run_that_sharpens_and_forgets_crosses_its_base():
    """The base solves every problem at times, the other two in three always and the rest never."""
    base, sharpened = [0.25] * 60, [1.0, 1.0, 0.0] * 20
    found = comparison(outcomes(base, 64, 0), outcomes(sharpened, 64, 1), EVALUATE)
    crosses = found["crossing"]
    assert crosses["above"] == "b" and 2 < crosses["k"] < 7 and crosses["share"] > 0.9
    assert crosses["low"] <= crosses["k"] <= crosses["high"]
    by_k = {(row["measure"], row["k"]): row for row in found["differences"]}
    assert by_k["pass", 1]["low"] > 0 > by_k["pass", 64]["high"]
    gap = found["sampling_efficiency_gap"]
    assert gap["k"] == 64 and gap["low"] < 1 / 3 < gap["high"], "1 - 2/3, and positive"


def test_the_gap_is_at_256_where_there_are_as_many():
    few = [0.3] * 8
    found = comparison(outcomes(few, 300, 0), outcomes(few, 4, 1), EVALUATE)
    assert found["sampling_efficiency_gap"]["k"] == 256
    assert max(row["k"] for row in found["differences"]) == 4
    assert found["mean_at_n"]["a"] == pytest.approx(0.3, abs=0.1)


def test_a_curve_that_is_never_crossed_is_null():
    found = comparison(outcomes([0.1] * 20, 8, 0), outcomes([0.9] * 20, 8, 1), EVALUATE)
    assert found["crossing"]["k"] is None and found["crossing"]["high"] is None


def test_one_completion_a_problem_says_nothing_of_difficulty():
    found = comparison(outcomes([0.5] * 9, 1, 0), outcomes([0.5] * 9, 1, 1), EVALUATE)
    assert found["by_pass_rate"] == [] and len(found["differences"]) == 2
