"""The tokens that one new query a row reads are the best ones, in order.

The reference is tested against sorting, and the kernel in Pallas' interpreters against the
reference.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode_selection import list_positions, list_selected_reference, list_selected_tpu
from kernels.reference import indexer_scores
from tests.interpreter import STRICT

pytestmark = pytest.mark.usefixtures("no_races")


def inputs(S: int, integers: bool, heads: int = 2):
    """Makes the indexer's q, k and w, and which tokens three rows may read: none, a few and most.

    Integers tie, and are exact in whatever order they are summed.
    """
    rng = np.random.default_rng(0)
    draw = (
        (lambda shape: rng.integers(-3, 4, shape))
        if integers
        else (lambda shape: rng.normal(size=shape))
    )
    q_BIC, k_BSC, w_BI = (
        jnp.asarray(draw(shape), jnp.float32) for shape in ((3, heads, 8), (3, S, 8), (3, heads))
    )
    allowed_BS = np.arange(S) < np.array([[0], [77], [S - 5]])
    allowed_BS[2, :9] = False
    return q_BIC, k_BSC, w_BI, jnp.asarray(allowed_BS)


def by_sorting(scores_S: np.ndarray, allowed_S: np.ndarray, topk: int) -> list[int]:
    places = np.flatnonzero(allowed_S)
    return sorted(places[np.argsort(-scores_S[places], kind="stable")][:topk].tolist())


@pytest.mark.parametrize("integers", [True, False], ids=["ties", "no ties"])
@pytest.mark.parametrize(("S", "topk"), [(300, 40), (300, 500), (77, 1)])
def test_the_reference_lists_the_best(S, topk, integers):
    q, k, w, allowed = made = inputs(S, integers)
    index, count = list_selected_reference(*made, topk)
    scores = np.asarray(indexer_scores(q[:, None], k, w[:, None])[:, 0])
    for b in range(3):
        expected = by_sorting(scores[b] + 0.0, np.asarray(allowed[b]), topk)
        assert index[b, : count[b]].tolist() == expected
    assert index.shape[1] == min(topk, S) and np.all((index >= 0) & (index < S))


def test_behind_a_list_stand_slots_of_their_own():
    index, count = list_positions(
        jnp.asarray([[False, True, False, True, False, False], [False] * 6]), 4
    )
    np.testing.assert_array_equal(index, [[1, 3, 2, 3], [0, 1, 2, 3]])
    np.testing.assert_array_equal(count, [2, 0])


CASES = {  # tokens, k, top-p, integers
    "ties": (1_500, 100, 1.0, True),
    "ties, top-p": (1_500, 100, 0.8, True),
    "two groups of blocks": (20_000, 700, 1.0, False),  # and lists longer than a chunk
    "two groups of blocks, top-p": (20_000, 700, 0.8, False),
    "k beyond the tokens": (700, 1_000, 1.0, False),
    "k beyond the tokens, top-p": (700, 1_000, 0.5, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_lists_what_the_reference_does(case):
    S, topk, top_p, integers = CASES[case]
    made = inputs(S, integers)
    index, count = list_selected_tpu(
        *made, topk, top_p, keys=1_024, interpret=STRICT if S < 2_000 else True
    )
    expected_index, expected_count = list_selected_reference(*made, topk, top_p)
    np.testing.assert_array_equal(count, expected_count)
    np.testing.assert_array_equal(index, expected_index)


def test_bfloat16_and_a_row_that_ends_early():
    """Keys behind the last allowed one are neither fetched nor scored: NaN there would show."""
    q, k, w, allowed = inputs(5_000, True)
    allowed = allowed & (jnp.arange(5_000) < 1_000)
    k = jnp.where(jnp.arange(5_000)[:, None] < 2_048, k, jnp.nan)
    found = list_selected_tpu(
        q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), w, allowed, 50, interpret=STRICT
    )
    for x, y in zip(
        found, list_selected_reference(q, jnp.nan_to_num(k), w, allowed, 50), strict=True
    ):
        np.testing.assert_array_equal(x, y)
