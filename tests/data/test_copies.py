"""Copying exercises: which tokens they have, and when a document becomes some."""

import collections

import numpy as np
import pytest

from data.copies import MAX_LENGTH, MIN_LENGTH, copy_exercises
from data.pipeline import batches
from data.tokenizer_training import bytes_tokenizer
from tests.data.reading import segments_of, take


def halves(exercise: list[int]) -> tuple[list[int], list[int]]:
    """Returns the two halves of an exercise."""
    return exercise[: len(exercise) // 2], exercise[len(exercise) // 2 :]


@pytest.mark.parametrize("length", [0, 3, 4, 7, 8, 500])
def test_every_span_is_written_twice_and_the_tokens_are_the_documents(length):
    ids = list(range(1000, 1000 + length))
    exercises = copy_exercises(ids, np.random.default_rng(0), max_tokens=256)
    spans = [first for first, second in map(halves, exercises) if first == second]
    assert len(spans) == len(exercises)
    used = [token for span in spans for token in span]
    assert len(set(used)) == len(used) and set(used) <= set(ids)
    assert length - MIN_LENGTH < len(used)  # fewer than MIN_LENGTH tokens are left over
    assert all(MIN_LENGTH <= len(span) <= MAX_LENGTH for span in spans)


def test_the_order_is_lost_and_lengths_are_uniform():
    ids = list(range(40_000))
    exercises = copy_exercises(ids, np.random.default_rng(0), max_tokens=256)
    flat = [token for exercise in exercises for token in halves(exercise)[0]]
    follows = np.mean(np.diff(flat) == 1)
    assert follows < 0.001  # by chance one in 40,000
    # The last exercise takes the tokens that are left.
    lengths = collections.Counter(len(exercise) // 2 for exercise in exercises[:-1])
    expected = (len(exercises) - 1) / (MAX_LENGTH - MIN_LENGTH + 1)
    assert set(lengths) == set(range(MIN_LENGTH, MAX_LENGTH + 1))
    assert all(abs(count - expected) < 5 * expected**0.5 for count in lengths.values())


def test_a_narrow_row_holds_an_exercise():
    assert {
        len(exercise)
        for exercise in copy_exercises(list(range(99)), np.random.default_rng(0), max_tokens=8)
    } == {8}


def test_batches_of_exercises(config):
    """All documents become exercises at rate 1, and about half of their tokens at a rate of 1/2."""
    tokenizer = bytes_tokenizer()

    def copied_share(rate: float) -> float:
        settings = config(copy_rate=rate, fim_rate=0.5, packing="fit", batch_size=8)
        segments = [
            ids
            for batch in take(batches(settings, tokenizer, split="train", seed=0), 40)
            for ids in segments_of(batch)
        ]
        return np.average(
            [halves(ids)[0] == halves(ids)[1] for ids in segments],
            weights=[len(ids) for ids in segments],
        )

    assert copied_share(1.0) == 1.0
    assert copied_share(0.0) == 0.0
    # A repeated token counts twice: 2/3 expected, of few and unequal documents.
    assert 0.3 < copied_share(0.5) < 0.9


def test_conversations_are_copied_too_but_never_in_chat(config):
    tokenizer = bytes_tokenizer()
    sources = ("task:arithmetic?count=200&style=chat",)
    settings = config(sources=sources, copy_rate=1.0, packing="fit", seq_len=512)
    assert all(
        halves(ids)[0] == halves(ids)[1]
        for batch in take(batches(settings, tokenizer, split="train", seed=0), 3)
        for ids in segments_of(batch)
    )

    def chat_batches(rate: float):
        settings = config(sources=sources, copy_rate=rate, seq_len=512)
        return take(batches(settings, tokenizer, split="train", seed=0, chat=True), 2)

    for one, other in zip(chat_batches(0.0), chat_batches(1.0), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
