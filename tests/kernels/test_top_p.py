"""Top-p keeps the smallest set of keys with a share of the softmax, as sorting in float64 does."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import top_p_keys

EXACT = 1e-5  # error of a sum of a few hundred float32 weights


def softmax(scores_S: np.ndarray) -> np.ndarray:
    weights_S = np.exp(scores_S.astype(np.float64) - scores_S.max())
    return weights_S / weights_S.sum()


SCORES = {
    "normal": lambda rng: (
        rng.normal(size=(6, 400)) * np.array([[0.01], [0.3], [1], [3], [10], [100]])
    ),
    "ties": lambda rng: rng.integers(-2, 3, (6, 400)),
    "all the same": lambda rng: np.full((6, 400), -7.0),
    "the first is not the largest": lambda rng: np.concatenate(
        [np.full((6, 1), -30.0), rng.normal(size=(6, 399))], axis=1
    ),
    "large": lambda rng: 1e30 * rng.normal(size=(6, 400)),
}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("kind", SCORES)
def test_it_is_the_smallest_set_with_the_share(kind, top_p):
    rng = np.random.default_rng(0)
    scores_BS = SCORES[kind](rng).astype(np.float32)
    allowed_BS = rng.random(scores_BS.shape) < 0.8
    kept_BS = np.asarray(top_p_keys(jnp.asarray(scores_BS), jnp.asarray(allowed_BS), top_p))
    assert not np.any(kept_BS & ~allowed_BS)
    for scores_S, allowed_S, kept_S in zip(scores_BS, allowed_BS, kept_BS, strict=True):
        p_S, kept_S = softmax(scores_S[allowed_S]), kept_S[allowed_S]
        assert kept_S.any() and p_S[kept_S].sum() >= top_p - EXACT
        descending = np.sort(p_S)[::-1]
        assert descending[: kept_S.sum() - 1].sum() < top_p + EXACT, (
            "with one fewer no set would have it"
        )
        if not kept_S.all():
            assert p_S[kept_S].min() >= p_S[~kept_S].max() * (1 - EXACT), "the heaviest"


def test_of_equal_scores_the_earlier_is_kept():
    scores_BS = jnp.asarray([[1.0, 1.0, 1.0, 1.0, -9.0], [0.0, 5.0, 0.0, 5.0, 0.0]])
    allowed_BS = jnp.asarray([[False, True, True, True, True], [True] * 5])
    np.testing.assert_array_equal(
        top_p_keys(scores_BS, allowed_BS, 0.6), [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    )


def test_everything_and_nothing():
    scores_BS, none = jnp.asarray([[1.0, 2.0, 3.0]]), jnp.zeros((1, 3), bool)
    np.testing.assert_array_equal(top_p_keys(scores_BS, ~none, 1.0), ~none)
    np.testing.assert_array_equal(top_p_keys(scores_BS, none, 0.9), none)
    np.testing.assert_array_equal(
        top_p_keys(jnp.asarray([[jnp.nan, 2.0, 3.0]]), jnp.asarray([[False, True, True]]), 0.7),
        [[0, 0, 1]],
    )
