"""bench.kernels without a TPU: the interpreter runs once what would be timed on one, and what is
counted is counted anew.
"""

import numpy as np
import pytest

from bench.kernel_programs import causal_tiles, splash_works, works
from bench.kernels import timed


@pytest.mark.slow
def test_what_is_timed_runs():
    found = timed(256, heads=4, interpret=True, repeats=1)
    assert found["interpreted"] and not found["static"]
    assert len(found["median_ms"]) == 4 and all(taken > 0 for taken in found["median_ms"].values())


def test_causal_tiles_are_those_with_a_pair():
    pairs = np.tril(np.ones((4_096, 4_096), bool))
    for queries, keys in ((512, 512), (512, 1_024), (128, 256), (1_024, 512)):
        tiles = pairs.reshape(4_096 // queries, queries, 4_096 // keys, keys).any(axis=(1, 3))
        assert causal_tiles(4_096, queries, keys) == np.sum(tiles)


def test_our_kernels_and_splash_count_the_same_mathematics():
    """Our tiles and splash's cover the same pairs but for the larger ones backward; its two
    backward kernels compute the logits and dP twice.
    """
    L, ours, theirs = 131_072, works(131_072), splash_works(131_072, causal=False)
    forward, backward, *_ = (work.tiles * work.flops for work in ours)
    forward_theirs, *backward_theirs = (work.tiles * work.flops for work in theirs)
    assert forward == forward_theirs
    once = sum(backward_theirs) * (3 * 192 + 2 * 128) / (4 * 192 + 3 * 128)
    assert 0.98 < backward / once < 1.02
    assert all(work.tile_bytes * work.tiles < L * L * 16 * 8 for work in ours), (
        "a few bytes for each pair and head, at most"
    )
