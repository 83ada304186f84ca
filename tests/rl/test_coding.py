"""Coded sets are the sets, whatever they are, and take the bytes that the code promises."""

import itertools
import math

import numpy as np
import pytest

from rl import coding
from rl.coding import CodedSets, largest_code


def lists_of(sets: list[list[set[int]]], layers: int, width: int) -> np.ndarray:
    """Sets [T][L] as ascending numbers, then -1."""
    rows = [[sorted(each) + [-1] * (width - len(each)) for each in token] for token in sets]
    return np.asarray(rows, np.int32).reshape(len(sets), layers, width)


def random_sets(rng: np.random.Generator, bounds: list[int], layers: int, most: int) -> list:
    """Of any number of numbers, from none to all: scattered ones, and dense runs."""

    def one(bound: int) -> set[int]:
        largest = min(most, bound)
        count = int(rng.choice(np.asarray([0, 1, largest, rng.integers(0, largest + 1)])))
        if rng.random() < 0.3:
            first = int(rng.integers(0, bound - count + 1))
            return set(range(first, first + count))
        return set(rng.choice(bound, count, replace=False).tolist())

    return [[one(bound) for _ in range(layers)] for bound in bounds]


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("most", [1, 2, 7, 40, 400])
def test_decoding_gives_the_sets_back(most, block, monkeypatch):
    """A query at each position of a sequence, in two layers, however few tokens are worked on at a
    time; and sets of ids, whose bound is that of the vocabulary.
    """
    monkeypatch.setattr(coding, "BLOCK", block)
    rng = np.random.default_rng(most)
    for bounds in (list(range(1, 90)), [130] * 20, [70_000, 3, 5_000], []):
        lists = lists_of(random_sets(rng, bounds, 2, most), 2, most)
        coded = CodedSets.of_lists(lists, np.asarray(bounds, int), most + 3)
        np.testing.assert_array_equal(coded.lists()[..., :most], lists)
        assert coded.lists().shape[-1] == most + 3 and (coded.lists()[..., most:] == -1).all()
        found = [[set() for _ in range(2)] for _ in bounds]
        for tokens, places, numbers in coded.numbers():
            for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
                found[tokens.start + place // 2][place % 2].add(number)
        for t, bound in enumerate(bounds):
            for layer in range(2):
                own = set(lists[t, layer].tolist()) - {-1}
                assert found[t][layer] == (own if len(own) < bound else set())


def test_parts_are_joined_and_cut():
    """As a row grows chunk by chunk and takes tokens back: to the same code as at once."""
    rng, bounds = np.random.default_rng(0), np.arange(300) + 1
    lists = lists_of(random_sets(rng, bounds.tolist(), 3, 12), 3, 12)
    whole = CodedSets.of_lists(lists, bounds, 12)
    cuts = [0, 1, 17, 17, 140, 300]
    chunks = list(itertools.pairwise(cuts))
    parts = [CodedSets.of_lists(lists[a:b], bounds[a:b], 12) for a, b in chunks]
    for joined in (CodedSets.joined(parts), CodedSets.joined([whole.between(*c) for c in chunks])):
        for name, value in vars(whole).items():
            np.testing.assert_array_equal(getattr(joined, name), value, err_msg=name)
    np.testing.assert_array_equal(whole.between(33, 90).lists(), lists[33:90])
    longer = whole.between(0, 200).extended(205)
    np.testing.assert_array_equal(longer.lists()[:200], lists[:200])
    assert len(longer) == 205 and (longer.lists()[200:] == -1).all()


def test_all_and_none_take_no_bytes():
    """But a number of numbers, and a bound for each token."""
    some = CodedSets.of_all(5, 2, 60)
    assert some.nbytes == 5 * 4 + 5 * 2 * 1
    np.testing.assert_array_equal(some.lists(), np.broadcast_to(np.arange(60), (5, 2, 60)))
    lists = np.asarray([[[0, -1]], [[0, 1]], [[-1, -1]]])
    first = CodedSets.of_lists(lists, np.asarray([1, 2, 3]), 2)
    assert first.high.size == first.low.size == 0
    np.testing.assert_array_equal(first.lists(), lists)


def test_a_long_context_takes_little():
    """2,048 of 32,768 keys: a bound of 1,381 bytes by counting the sets, a budget of 1.6 KiB."""
    k, keys = 2_048, 32_768
    bound = (math.lgamma(keys + 1) - math.lgamma(k + 1) - math.lgamma(keys - k + 1)) / math.log(2)
    rng = np.random.default_rng(0)
    lists = np.stack([np.sort(rng.choice(keys, k, replace=False)) for _ in range(6)])
    coded = CodedSets.of_lists(lists.reshape(2, 3, k).astype(np.int32), np.full(2, keys), k)
    np.testing.assert_array_equal(coded.lists().reshape(6, k), lists)
    assert coded.high.size + coded.low.size == 6 * 1_536
    assert bound / 8 < 1_536 and round(bound / 8) == 1_381
    assert coded.nbytes / 6 <= 1.6 * 1_024
    assert largest_code(k, keys) == 1_536 + 2


def test_no_set_takes_more_than_the_largest_code():
    rng = np.random.default_rng(0)
    for _ in range(300):
        bound = int(rng.integers(1, 3_000))
        most = int(rng.integers(1, bound + 1))
        lists = lists_of(random_sets(rng, [bound], 1, most), 1, most)
        coded = CodedSets.of_lists(lists, np.asarray([bound]), most)
        assert coded.nbytes - 4 <= largest_code(most, bound) <= bound / 8 + 6
