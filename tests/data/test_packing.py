"""Packed rows: no token is lost, segments and positions are right, and states resume."""

import json

import grain
import numpy as np
import pytest

from data.packing import fit_rows, split_rows, to_batch

PAD = 99
LENGTHS = [3, 9, 16, 1, 40, 7, 8, 8, 5, 2, 30]


def documents():
    """Returns documents of different lengths, as grain gives them.

    Every token of document n is n + 1 and its weight half of that, so that a row says where each of
    its tokens is from.
    """
    numbered = list(enumerate(LENGTHS, 1))
    return grain.MapDataset.source(
        [
            {"tokens": np.full(length, n, np.int32), "weights": np.full(length, n / 2, np.float32)}
            for n, length in numbered
        ]
    )


def tokens_only():
    """Returns the documents without weights."""
    return documents().map(lambda element: {"tokens": element["tokens"]}).to_iter_dataset()


def rows_of(dataset) -> dict[str, np.ndarray]:
    """Returns all rows of a packer, stacked."""
    rows = list(dataset)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def test_split_concatenates_the_documents():
    batch = to_batch(rows_of(split_rows(tokens_only(), 16)), PAD, cross_document_attention=False)
    stream = batch["tokens"].ravel()
    expected = np.repeat(np.arange(len(LENGTHS)) + 1, LENGTHS)
    np.testing.assert_array_equal(stream[: len(expected)], expected)
    assert (stream[len(expected) :] == PAD).all() and len(stream) - len(expected) < 16
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == segment
            assert len(set(batch["tokens"][row][inside])) == 1
            np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))


def test_fit_keeps_documents_whole():
    short = documents().filter(lambda element: len(element["tokens"]) <= 16).to_iter_dataset()
    packed = rows_of(fit_rows(short, 16, rows=2, seed=0, weighted=True))
    batch = to_batch(packed, PAD, cross_document_attention=False)
    is_token = batch["segments"] > 0
    for number, length in enumerate(LENGTHS):
        rows, columns = np.nonzero(is_token & (batch["tokens"] == number + 1))
        assert len(rows) == (length if length <= 16 else 0)
        assert len(set(rows)) <= 1 and (np.diff(columns) == 1).all()
        np.testing.assert_array_equal(batch["weights"][rows, columns], (number + 1) / 2)
        np.testing.assert_array_equal(batch["positions"][rows, columns], np.arange(len(rows)))
    assert (batch["weights"][~is_token] == 0).all() and (batch["tokens"][~is_token] == PAD).all()


def test_a_batch_has_four_arrays_of_fixed_types():
    batch = to_batch(rows_of(split_rows(tokens_only(), 16)), PAD, cross_document_attention=True)
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": np.int32,
        "positions": np.int32,
        "segments": np.int32,
        "weights": np.float32,
    }


def test_cross_document_attention_makes_a_row_one_segment():
    packed = rows_of(split_rows(tokens_only(), 16))
    apart, across = (
        to_batch(packed, PAD, cross_document_attention=crossing) for crossing in (False, True)
    )
    is_token = apart["segments"] > 0
    np.testing.assert_array_equal(across["segments"], is_token)
    np.testing.assert_array_equal(across["positions"], np.where(is_token, np.arange(16), 0))
    np.testing.assert_array_equal(across["tokens"], apart["tokens"])
    np.testing.assert_array_equal(across["weights"], is_token)


@pytest.mark.parametrize("through_json", [False, True])
def test_the_state_after_every_row_resumes(through_json):
    """One row ends with its document: grain's own state does not survive JSON there.

    `_ConcatThenSplit` says why.
    """
    dataset = split_rows(tokens_only(), 16)
    expected = [row["tokens"] for row in dataset]
    for stop in range(len(expected)):
        iterator = iter(dataset)
        for _ in range(stop):
            next(iterator)
        state = iterator.get_state()
        resumed = iter(dataset)
        resumed.set_state(json.loads(json.dumps(state)) if through_json else state)
        np.testing.assert_array_equal([row["tokens"] for row in resumed], expected[stop:])
