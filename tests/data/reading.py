"""Reads batches back: their segments, and the documents that infilling was made of."""

import itertools

import numpy as np

from data.tokenizer import Tokenizer


def take(dataset, count):
    """Returns the first `count` elements, or all if there are fewer."""
    return list(itertools.islice(iter(dataset), count))


def assert_same(found, expected):
    """Asserts that two lists of batches are equal."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def segments_of(batch) -> list[list[int]]:
    """Returns the ids of each segment of each row."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
        found += [tokens[segments == segment].tolist() for segment in range(1, segments.max() + 1)]
    return found


def recover(ids: list[int], tokenizer: Tokenizer) -> str:
    """Returns the document that `fim_tokens` was given.

    Asserts that the sentinels are in order, each once.
    """
    markers = [*tokenizer.fim, tokenizer.eos]
    assert [index for index in ids if index in markers] == markers
    assert (ids[0], ids[-1]) == (tokenizer.fim.prefix, tokenizer.eos)
    at_suffix, at_middle = ids.index(tokenizer.fim.suffix), ids.index(tokenizer.fim.middle)
    # In SPM the part before [suf] is empty and the prefix comes before the middle: the same
    # formula recovers both.
    before, after = ids[1:at_suffix], ids[at_middle + 1 : -1]
    suffix = ids[at_suffix + 1 : at_middle]
    return tokenizer.decode(before) + tokenizer.decode(after) + tokenizer.decode(suffix)
