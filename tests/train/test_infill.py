"""Does the evaluation withhold what it says it withholds, and nothing else?"""

import numpy as np
import pytest

from data.tokenizer import bytes_tokenizer
from errors import UserError
from train.infill import VARIANTS, infill_rows, middle_losses

TOKENIZER = bytes_tokenizer()
TEXTS = ["one line\n", *("".join(f"{document}.{line}\n" for line in range(8)) for document in range(4)), "long\n" * 100]
SEQUENCE = 64


def parts(batch, row):
    """(prompt ids, middle ids)."""
    real, weighed = batch["segments"][row] > 0, batch["weights"][row] > 0
    return batch["tokens"][row][real & ~weighed].tolist(), batch["tokens"][row][weighed].tolist()


def test_the_middle_is_the_same_and_the_rest_is_as_said():
    rows = infill_rows(TEXTS, TOKENIZER, SEQUENCE, 3)
    pre, suf, mid = TOKENIZER.fim
    for row in range(3):
        lines = [TOKENIZER.encode(f"{row}.{line}\n") for line in range(8)]
        prefix, middle, suffix = ([i for line in piece for i in line] for piece in (lines[:3], lines[3:5], lines[5:]))
        expected = {"with_suffix": [pre, *prefix, suf, *suffix, mid], "without_suffix": prefix, "empty_suffix": [pre, *prefix, suf, mid]}
        for name in VARIANTS:
            assert parts(rows[name], row) == (expected[name], middle)


def test_rows_are_batches():
    """Positions from 0 in one segment, zeros in the padding; weights on the middle alone."""
    for batch in infill_rows(TEXTS, TOKENIZER, SEQUENCE, 4).values():
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "positions", "segments"), ((4, SEQUENCE), np.int32)),
            "weights": ((4, SEQUENCE), np.float32),
        }
        lengths = batch["segments"].sum(axis=1)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(batch["positions"][row], [*range(length), *[0] * (SEQUENCE - length)])
            assert (batch["tokens"][row, length:] == TOKENIZER.pad).all()


def test_too_few_documents_is_an_error():
    with pytest.raises(UserError, match=r"evaluate.infill_documents = 5: only 4 held-out documents .* fit in data.sequence = 64"):
        infill_rows(TEXTS, TOKENIZER, SEQUENCE, 5)


def test_middle_losses_are_per_token_of_the_middle():
    rows = infill_rows(TEXTS, TOKENIZER, SEQUENCE, 2)
    # As if every token of the middle cost 2 nats, and the variant's prompt nothing.
    losses = middle_losses(rows, lambda batch: ({"lm": 2.0 * batch["weights"].sum()}, {"lm": batch["weights"].sum()}))
    assert losses == {f"middle_loss_{name}": 2.0 for name in VARIANTS}
