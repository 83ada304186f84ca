"""Properties of the padding of ragged rows."""

import numpy as np
import pytest

from data.padding import pad_rows

ROWS = [[4, 5], [], [6, 7, 8]]


@pytest.mark.parametrize(
    ("side", "tokens", "segments"),
    [
        (
            "right",
            [[4, 5, 9, 9], [9, 9, 9, 9], [6, 7, 8, 9]],
            [[1, 1, 0, 0], [0] * 4, [1, 1, 1, 0]],
        ),
        ("left", [[9, 9, 4, 5], [9, 9, 9, 9], [9, 6, 7, 8]], [[0, 0, 1, 1], [0] * 4, [0, 1, 1, 1]]),
    ],
)
def test_padding_fills_the_given_side(side, tokens, segments):
    tokens_BT, segments_BT = pad_rows(ROWS, 4, pad=9, side=side)
    np.testing.assert_array_equal(tokens_BT, tokens)
    np.testing.assert_array_equal(segments_BT, segments)
    assert tokens_BT.dtype == segments_BT.dtype == np.int32


def test_no_rows_give_an_empty_array():
    tokens_BT, segments_BT = pad_rows([], 4, pad=9)
    assert tokens_BT.shape == segments_BT.shape == (0, 4)


def test_a_row_longer_than_the_width_is_an_error():
    with pytest.raises(ValueError, match="row 2 has 3 tokens, more than the width 2"):
        pad_rows(ROWS, 2, pad=9)
