"""What was measured of problems before a run: which are left out, and what it counts for."""

import dataclasses
import json

import numpy as np
import pytest

from data.tasks.problem import Problem
from errors import UserError
from rl.config import EvaluateConfig, ReinforceConfig
from rl.curriculum import Curriculum, failure_rates
from rl.pass_rates import PassRates, Tries, digest, problems_within

HARD = (3, 1, 2, 1, 3, 2)
PROBLEMS = [Problem(f"what is {n}?", str(n), ops=ops, id=f"p{n}") for n, ops in enumerate(HARD)]
# Of problem 5 nothing is known, and 2 was guessed.
TRIES = {0: Tries(10, 0), 1: Tries(10, 9), 2: Tries(10, 5, True), 3: Tries(10, 10, True),
         4: Tries(10, 2, False)}  # fmt: skip


def measured(tries=TRIES) -> PassRates:
    return PassRates(
        "hot",
        {(PROBLEMS[n].id, digest(PROBLEMS[n].question)): each for n, each in tries.items()},
        thought=1,
    )


def config(**changes) -> ReinforceConfig:
    return dataclasses.replace(ReinforceConfig(), pass_rates_from="hot", **changes)


def left(**changes) -> list[int]:
    found = problems_within(PROBLEMS, measured(), config(**changes))
    return [PROBLEMS.index(problem) for problem in found]


@pytest.mark.parametrize(
    "changes, kept, words",
    [
        ({}, [0, 1, 2, 3, 4, 5], "pass rates  5 of 6 problems in hot\n"),
        (
            {"min_pass_rate": 0.2, "max_pass_rate": 0.9},
            [1, 2, 4, 5],
            "; left out 1 with a pass rate below 0.2, 1 with a pass rate above 0.9; 4 to train on",
        ),
        (
            {"guessed": "left_out"},
            [0, 1, 4, 5],
            "; left out 2 guessed in 8 attempts, thinking 1 token; 4 to train on",
        ),
        # Problem 3 breaks two rules, and counts for the first.
        (
            {"guessed": "left_out", "max_pass_rate": 0.95},
            [0, 1, 4, 5],
            "; left out 1 with a pass rate above 0.95, 1 guessed in 8 attempts, thinking 1 token",
        ),
    ],
)
def test_problems_outside_the_bounds_are_left_out(changes, kept, words, capsys):
    """The bounds themselves are within, and what was not measured stays."""
    assert left(**changes) == kept
    assert words in capsys.readouterr().out


def test_without_a_measurement_all_stay(capsys):
    assert problems_within(PROBLEMS, None, ReinforceConfig()) is PROBLEMS
    assert capsys.readouterr().out == ""


def test_another_question_under_an_id_was_not_measured(capsys):
    """As where a line was put into a file of problems."""
    moved = [dataclasses.replace(PROBLEMS[0], question="something else?"), *PROBLEMS[1:]]
    found = problems_within(moved, measured(), config(min_pass_rate=0.1))
    assert found == moved, "the first one was never solved, but it is another"
    assert "4 of 6 problems in hot" in capsys.readouterr().out
    assert measured().of(moved[0]) is None


def test_none_in_common_and_none_left_are_one_line():
    with pytest.raises(
        UserError, match=r"pass_rates_from = 'hot': none of the 1 problems of reinf"
    ):
        problems_within([Problem("a", "b")], measured(), config())
    with pytest.raises(
        UserError,
        match=r"pass_rates_from = 'hot': leaves out all 2 problems: 1 .* below 0.5, 1 guessed in 8",
    ):
        problems_within(
            [PROBLEMS[0], PROBLEMS[2]], measured(), config(min_pass_rate=0.5, guessed="left_out")
        )


def test_it_goes_through_json():
    again = PassRates.from_json(json.loads(json.dumps(measured().as_json())))
    assert again.as_json() == measured().as_json()
    assert [again.of(problem) for problem in PROBLEMS] == [*TRIES.values(), None]
    tried_P, solved_P = again.counts(PROBLEMS)
    assert tried_P.tolist() == [10, 10, 10, 10, 10, 0] and solved_P.tolist() == [0, 9, 5, 10, 2, 0]


def test_the_runs_own_tries_are_added_to_those_before():
    """9 of 10 before and 1 of 5 in the run is 10 of 15."""
    own = Curriculum(PROBLEMS, config(retire_at=0.9, order="unsolved"), 12, 3, measured())
    np.testing.assert_array_equal(own.pass_rates, [0, 0.9, 0.5, 1, 0.2, np.nan])
    assert own.retired_P.tolist() == [False, True, False, True, False, False]
    found = own.metrics()
    assert found == {
        "curriculum/tried": 5, "curriculum/retired": 2,
        "curriculum/pass_rate": pytest.approx((0 + 0.9 + 0.5 + 1 + 0.2) / 5),
    }  # fmt: skip
    own.note(1, [True] + [False] * 4)
    own.note(5, [True, False])
    np.testing.assert_allclose(own.pass_rates, [0, 10 / 15, 0.5, 1, 0.2, 0.5])
    assert own.retired_P.tolist() == [False, False, False, True, False, False]


def test_unsolved_goes_by_them_from_the_start():
    """Chances 1, 0.1, 0.5, 0, 0.8 and 1 of 3.4, before anything is tried."""
    own = Curriculum(PROBLEMS, config(order="unsolved"), 12, 3, measured())
    counts = np.bincount([own.draw() for _ in range(3_000)], minlength=6)
    # Three deviations of a share of 3,000 draws are at most 0.027.
    np.testing.assert_allclose(counts / 3_000, np.array([1, 0.1, 0.5, 0, 0.8, 1]) / 3.4, atol=0.027)


def test_a_state_has_the_runs_own_tries_alone():
    """So that what was measured, which a run has from elsewhere, is not counted twice."""
    options = config(order="unsolved", retire_at=0.9)
    own = Curriculum(PROBLEMS, options, 12, 3, measured())
    own.draw()
    own.note(0, [True, False])
    state = json.loads(json.dumps(own.get_state()))
    assert state == {"turn": 1, "tried_and_solved": {"p0": [2, 1]}}
    again = Curriculum(PROBLEMS, options, 12, 3, measured())
    again.set_state(state)
    assert [again.draw() for _ in range(20)] == [own.draw() for _ in range(20)]
    np.testing.assert_array_equal(again.pass_rates, own.pass_rates)


def test_the_easiest_are_those_that_are_solved_most():
    """Problem 5, of which nothing is known, is as hard as 2, which has as many operations, and
    comes in an order of its own among them; one of as many operations as no other has the mean.
    """
    own = Curriculum(PROBLEMS, config(order="easy_first"), 6, 3, measured())
    drawn = [own.draw() for _ in range(6)]
    assert drawn in ([3, 1, 2, 5, 4, 0], [3, 1, 5, 2, 4, 0])
    rates_P = np.array([0.25, np.nan, 0.75, np.nan])
    np.testing.assert_allclose(
        failure_rates(rates_P, np.array([1, 1, 2, 7])), [0.75, 0.75, 0.25, 0.5]
    )
    np.testing.assert_array_equal(failure_rates(np.full(2, np.nan), np.array([1, 2])), [0, 0])
    # Where all are solved as often, operations say which is easy; and rates where these do not.
    alike = measured(dict.fromkeys(range(6), Tries(4, 2)))
    by_ops = Curriculum(PROBLEMS, config(order="easy_first"), 6, 3, alike)
    assert [HARD[by_ops.draw()] for _ in range(6)] == sorted(HARD)
    plain = [dataclasses.replace(problem, ops=0) for problem in PROBLEMS[:5]]
    by_rate = Curriculum(plain, config(order="easy_first"), 5, 3, measured())
    assert [by_rate.draw() for _ in range(5)] == [3, 1, 2, 4, 0]
    with pytest.raises(UserError, match=r"harder than another by .* or reinforce.pass_rates_from"):
        Curriculum(plain, config(order="easy_first"), 5, 3, alike)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_pass_rate": 1.5}, "reinforce.min_pass_rate = 1.5: must be between 0 and 1"),
        (
            {"min_pass_rate": 0.6, "max_pass_rate": 0.5},
            "reinforce.max_pass_rate = 0.5: must be between reinforce.min_pass_rate = 0.6 and 1",
        ),
        ({"guessed": "dropped"}, "reinforce.guessed = 'dropped': must be one of kept, left_out"),
        ({"guess_attempts": 0}, "reinforce.guess_attempts = 0: must be positive"),
    ],
)
def test_bounds_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes", [{"min_pass_rate": 0.1}, {"max_pass_rate": 0.9}, {"guessed": "left_out"}]
)
def test_bounds_need_a_measurement(changes):
    (name,) = changes
    with pytest.raises(UserError, match=rf"reinforce.{name} = .*: needs reinforce.pass_rates_from"):
        dataclasses.replace(ReinforceConfig(), **changes)


def test_a_split_is_one_of_two():
    with pytest.raises(
        UserError, match=r"evaluate.split = 'test': must be one of validation, train"
    ):
        dataclasses.replace(EvaluateConfig(), split="test")
