import collections

import numpy as np
import pytest

from data.copies import LONGEST, SHORTEST, copy_exercises
from data.pipeline import batches
from data.tokenizer import bytes_tokenizer
from tests.data.test_pipeline import segments_of, take


def halves(exercise: list[int]) -> tuple[list[int], list[int]]:
    return exercise[: len(exercise) // 2], exercise[len(exercise) // 2 :]


@pytest.mark.parametrize("length", [0, 3, 4, 7, 8, 500])
def test_every_run_stands_twice_and_the_tokens_are_the_documents(length):
    ids = list(range(1000, 1000 + length))
    exercises = copy_exercises(ids, np.random.default_rng(0), longest=256)
    runs = [first for first, second in map(halves, exercises) if first == second]
    assert len(runs) == len(exercises)
    used = [token for run in runs for token in run]
    assert len(set(used)) == len(used) and set(used) <= set(ids)
    assert length - SHORTEST < len(used)  # what is left over makes no run
    assert all(SHORTEST <= len(run) <= LONGEST for run in runs)


def test_the_order_is_lost_and_lengths_are_uniform():
    ids = list(range(40_000))
    exercises = copy_exercises(ids, np.random.default_rng(0), longest=256)
    flat = [token for exercise in exercises for token in halves(exercise)[0]]
    follows = np.mean(np.diff(flat) == 1)
    assert follows < 0.001  # by chance one in 40,000
    lengths = collections.Counter(
        len(exercise) // 2 for exercise in exercises[:-1]
    )  # the last takes what is left
    expected = (len(exercises) - 1) / (LONGEST - SHORTEST + 1)
    assert set(lengths) == set(range(SHORTEST, LONGEST + 1))
    assert all(abs(count - expected) < 5 * expected**0.5 for count in lengths.values())


def test_a_narrow_row_holds_an_exercise():
    assert {
        len(exercise)
        for exercise in copy_exercises(list(range(99)), np.random.default_rng(0), longest=8)
    } == {8}


def test_batches_of_exercises(config):
    """All of them, at rate 1; about half of the documents' tokens, at a rate of a half."""
    tokenizer = bytes_tokenizer()

    def share(rate: float) -> float:
        settings = config(copy_rate=rate, fim_rate=0.5, packing="fit", batch=8)
        segments = [
            ids
            for batch in take(batches(settings, tokenizer, split="train", seed=0), 40)
            for ids in segments_of(batch)
        ]
        return np.average(
            [halves(ids)[0] == halves(ids)[1] for ids in segments],
            weights=[len(ids) for ids in segments],
        )

    assert share(1.0) == 1.0
    assert share(0.0) == 0.0
    assert (
        0.3 < share(0.5) < 0.9
    )  # a repeated token counts twice: 2/3 expected, of few and unequal documents


def test_conversations_are_copied_too_but_never_in_chat(config):
    tokenizer = bytes_tokenizer()
    settings = config(
        sources=("task:arithmetic?count=200&style=chat",),
        copy_rate=1.0,
        packing="fit",
        sequence=512,
    )
    assert all(
        halves(ids)[0] == halves(ids)[1]
        for batch in take(batches(settings, tokenizer, split="train", seed=0), 3)
        for ids in segments_of(batch)
    )
    without, with_copies = (
        take(
            batches(
                config(sources=settings.sources, copy_rate=rate, sequence=512),
                tokenizer,
                split="train",
                seed=0,
                chat=True,
            ),
            2,
        )
        for rate in (0.0, 1.0)
    )
    for one, other in zip(without, with_copies, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
