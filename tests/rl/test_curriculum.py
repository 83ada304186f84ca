"""The order of problems, by what has been solved."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from data.tasks.problem import Problem
from errors import UserError
from rl.config import EvaluateConfig, ReinforceConfig
from rl.curriculum import Curriculum
from rl.pay import Rewards, paid_weights, solved
from rl.problems import place_of_draw

HARD = (3, 1, 2, 1, 3, 2)
PROBLEMS = [Problem(f"what is {n}?", str(n), ops=ops) for n, ops in enumerate(HARD)]


def curriculum(problems=PROBLEMS, draws: int = 12, **changes) -> Curriculum:
    config = dataclasses.replace(ReinforceConfig(), **changes)
    return Curriculum(problems, config, draws, seed=3)


def drawn(own: Curriculum, count: int) -> list[int]:
    return [own.draw() for _ in range(count)]


def test_shuffled_is_the_order_of_numbers():
    own = curriculum()
    assert drawn(own, 15) == [place_of_draw(number, 6, 3) for number in range(15)]
    own.at(4)
    assert own.draw() == place_of_draw(4, 6, 3)


def test_what_is_solved_often_is_not_drawn_again():
    own = curriculum(retire_at=0.75)
    own.note(2, [True, True, True, False])
    own.note(4, [True, True, False, False])
    assert own.retired_P.tolist() == [False, False, True, False, False, False]
    assert set(drawn(own, 20)) == {0, 1, 3, 4, 5}
    own.note(4, [True] * 4)
    assert 4 not in drawn(own, 20)
    own.note(2, [False] * 8)  # of a group that was in flight
    assert 2 in drawn(own, 20)
    for place in range(6):
        own.note(place, [True] * 100)
    assert set(drawn(own, 20)) == set(range(6)), "where all are retired, none is"


def test_unsolved_problems_come_in_proportion():
    """Rates 0.8, 0.5 and none yet; the rest are always solved: chances 0.2, 0.5 and 1 of 1.7."""
    own = curriculum(order="unsolved")
    for place, solved_of_10 in enumerate((8, 5, None, 10, 10, 10)):
        if solved_of_10 is not None:
            own.note(place, [True] * solved_of_10 + [False] * (10 - solved_of_10))
    counts = collections.Counter(drawn(own, 3_000))
    shares = np.array([counts[place] for place in range(6)]) / 3_000
    # Three deviations of a share of 3,000 draws are at most 0.027.
    np.testing.assert_allclose(shares, np.array([0.2, 0.5, 1, 0, 0, 0]) / 1.7, atol=0.027)


def test_easy_problems_come_first_over_the_planned_draws():
    hardness = [HARD[place] for place in drawn(curriculum(order="easy_first"), 12)]
    assert hardness == sorted(hardness) and set(hardness) == {1, 2, 3}
    assert len(drawn(curriculum(order="easy_first", draws=2), 7)) == 7
    few = curriculum(order="easy_first", draws=2, retire_at=0.9)  # which come by two of six
    come_by = drawn(few, 2)
    for place in come_by:
        few.note(place, [True] * 4)
    assert set(drawn(few, 2)).isdisjoint(come_by)
    with pytest.raises(UserError, match=r"no problem of 'task:arithmetic' is harder than another"):
        curriculum([Problem("a", "b"), Problem("c", "d")], order="easy_first")


@pytest.mark.parametrize("order", ["shuffled", "unsolved", "easy_first"])
def test_it_goes_on_from_a_state(order):
    own = curriculum(order=order, retire_at=0.9)
    drawn(own, 5)
    own.note(1, [True, False])
    own.note(3, [True, True])
    state = json.loads(json.dumps(own.get_state()))
    again = curriculum(order=order, retire_at=0.9)
    again.set_state(state)
    assert drawn(again, 12) == drawn(own, 12) and again.metrics() == own.metrics()
    assert again.metrics() == {
        "curriculum/tried": 2, "curriculum/pass_rate": 0.75, "curriculum/retired": 1,
    }  # fmt: skip
    # Of problems in another order, or fewer of them, what is known stays with each.
    fewer = curriculum(PROBLEMS[:3:-1] + PROBLEMS[1:2], order=order)
    fewer.set_state(state)
    np.testing.assert_array_equal(fewer.pass_rates, [np.nan, np.nan, 0.5])


def test_what_solves_a_problem_is_what_evaluation_says():
    """That reward is computed where the order needs it, with weight 0 unless it counts."""
    evaluate = EvaluateConfig(reward="answer", success=1.0)
    plain = ReinforceConfig(rewards={"format": 0.5})
    assert paid_weights(plain, evaluate) == {"format": 0.5}
    by_rate = dataclasses.replace(plain, retire_at=0.9)
    assert paid_weights(by_rate, evaluate) == {"answer": 0.0, "format": 0.5}
    paid_MPG = np.asarray([[[1, 0, 1]], [[1, 1, 0]]], np.float32)
    rewards = Rewards(("answer", "format"), np.asarray([0, 0.5], np.float32), paid_MPG)
    assert solved(rewards, evaluate).tolist() == [True, False, True]
    without = Rewards(("format",), np.ones(1, np.float32), paid_MPG[1:])
    assert not solved(without, evaluate).any()


def test_what_cannot_be_is_one_line():
    for changes, message in (
        ({"order": "hard_first"}, "reinforce.order = 'hard_first'"),
        ({"retire_at": 1.5}, "reinforce.retire_at = 1.5: must be between 0"),
        ({"zero_variance": "skip"}, "reinforce.zero_variance = 'skip'"),
        ({"variance_reward": "x"}, r"reinforce.variance_reward = 'x': is none of .*'answer'"),
        ({"resample_limit": 0}, "reinforce.resample_limit = 0: must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(ReinforceConfig(), **changes)
