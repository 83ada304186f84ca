"""cons@k is what counting all draws gives, ties included."""

import itertools

import numpy as np
import pytest

from rl.voting import NO_ANSWER, TIES, cons_at_k, cons_at_k_table


def majority(classes, correct, ties: str) -> float:
    """What one vote pays, by the definition."""
    votes: dict[int, list[int]] = {}
    for place, name in enumerate(classes):
        if name != NO_ANSWER:
            votes.setdefault(name, []).append(place)
    most = max(map(len, votes.values()), default=0)
    tied = [name for name in votes if len(votes[name]) == most]  # in the order of their first
    if not tied:
        return 0.0
    tied = tied[:1] if ties == "first" else tied
    return float(np.mean([correct[name] for name in tied]))


def counted(classes, correct_G, k: int, ties: str) -> float:
    """The mean over all draws of k, in the order of sampling."""
    classes = list(classes)
    correct = {name: np.mean(correct_G[np.equal(classes, name)]) for name in set(classes)}
    draws = itertools.combinations(range(len(classes)), k)
    return float(np.mean([majority([classes[g] for g in d], correct, ties) for d in draws]))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_mean_over_all_draws(seed, ties):
    """Ten completions in up to four classes, some without an answer; rounding alone differs."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(-1, rng.integers(1, 5), size=10)
    right = rng.integers(0, 2, size=6)
    correct_G = right[classes] * (classes >= 0)
    for k in range(1, 11):
        expected = counted(classes, correct_G, k, ties)
        assert cons_at_k(classes, correct_G, k, ties) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", TIES)
def test_a_class_that_is_right_at_times_pays_its_share(ties):
    classes, correct_G = np.array([0, 1, 0, 1, 1, 0]), np.array([1, 0, 0, 0, 1, 1])
    for k in range(1, 7):
        expected = counted(classes, correct_G, k, ties)
        assert cons_at_k(classes, correct_G, k, ties) == pytest.approx(expected, abs=1e-12)


def test_values_worked_by_hand():
    """Two right of three, one wrong: both of two are right in 1 of 3 draws, else there is a tie."""
    classes, correct_G = np.array([7, 7, 9]), np.array([1, 1, 0])
    assert cons_at_k(classes, correct_G, 1) == pytest.approx(2 / 3)
    assert cons_at_k(classes, correct_G, 2) == pytest.approx(1 / 3 + 2 / 3 / 2)
    assert cons_at_k(classes, correct_G, 3) == 1.0
    assert cons_at_k(classes, correct_G, 2, "first") == pytest.approx(1.0)
    assert cons_at_k(classes[::-1], correct_G[::-1], 2, "first") == pytest.approx(1 / 3)


def test_no_answer_never_wins():
    """However many there are; and where no other votes, the majority is wrong."""
    classes, correct_G = np.array([NO_ANSWER] * 7 + [3]), np.array([0] * 7 + [1])
    assert cons_at_k(classes, correct_G, 8) == 1.0
    assert cons_at_k(classes, correct_G, 2) == pytest.approx(2 / 8)
    assert cons_at_k(np.full(4, NO_ANSWER), np.zeros(4), 2) == 0.0


@pytest.mark.parametrize("ties", TIES)
def test_many_completions_neither_overflow_nor_lose_precision(ties):
    """512 completions, by a simulation of 20,000 draws: its standard error is below 0.0036."""
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 1, 2, NO_ANSWER], p=[0.35, 0.33, 0.12, 0.2], size=512)
    correct_G = (classes == 0).astype(float)
    orders = np.argsort(rng.random((20_000, 512)), axis=1)[:, :40]
    drawn = classes[np.sort(orders, axis=1)]
    right, wrong = (drawn == 0).sum(axis=1), (drawn == 1).sum(axis=1)
    third = (drawn == 2).sum(axis=1)
    wins = (right > wrong) & (right > third)
    tied = (right == wrong) & (right > third)
    first = np.argmax(drawn == 0, axis=1) < np.argmax(drawn == 1, axis=1)
    simulated = (wins + tied * (first if ties == "first" else 0.5)).mean()
    assert cons_at_k(classes, correct_G, 40, ties) == pytest.approx(simulated, abs=0.015)


def test_the_majority_of_many_is_surer_than_one():
    """If the right answer is the likeliest one, cons@k rises to 1; if it is not, it falls to 0."""
    classes = np.repeat([0, 1, 2, 3], [26, 20, 10, 8])
    for right, end in ((0, 1.0), (1, 0.0)):
        curve = [cons_at_k(classes, classes == right, k) for k in (1, 4, 16, 48, 64)]
        assert abs(curve[-1] - end) < 1e-12 and abs(curve[0] - np.mean(classes == right)) < 1e-12
        assert abs(curve[3] - end) < abs(curve[2] - end) < abs(curve[0] - end)


def test_the_table_averages_over_problems():
    classes = [np.array([0, 0, 1]), np.array([0, 1, 1])]
    correct = [np.array([1, 1, 0]), np.array([1, 0, 0])]
    table = cons_at_k_table(classes, correct, (1, 3), resamples=20, seed=0)
    assert table[1].mean == pytest.approx(0.5) and table[3].mean == pytest.approx(0.5)
    assert table[3].low == 0.0 and table[3].high == 1.0


@pytest.mark.parametrize("k", [0, 4])
def test_it_refuses_the_impossible(k):
    with pytest.raises(ValueError, match="k <= n"):
        cons_at_k(np.zeros(3, int), np.ones(3), k)
