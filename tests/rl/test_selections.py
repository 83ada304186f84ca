"""What is singled out of an update: by brute force, and the same however the batch is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from rl.algorithms import selections
from rl.algorithms.sequences import Sequences
from rl.algorithms.spec import get_algorithm
from rl.algorithms.tokens import Tokens
from tests.rl.losses import batch_of, paid_of, signals

RNG = np.random.default_rng(0)
B, T = 6, 9
MASK = np.arange(T) < RNG.integers(1, T + 1, size=(B, 1))
OLD, SAMPLER = (np.where(MASK, -RNG.exponential(size=(B, T)), 0.0) for _ in range(2))
LOGPROBS = np.where(MASK, OLD + 0.4 * RNG.normal(size=(B, T)), 0.0)
ENTROPY = np.where(MASK, RNG.exponential(size=(B, T)), 0.0)
ADVANTAGES = np.broadcast_to(RNG.normal(size=(B, 1)), (B, T))
LOTS = RNG.random((B, T))


def tokens() -> Tokens:
    arrays = (LOGPROBS, ENTROPY, OLD, SAMPLER, ADVANTAGES)
    sequences = Sequences(jnp.asarray(MASK, jnp.int32), jnp.ones(B, jnp.int32))
    return Tokens(sequences, *(jnp.asarray(x, jnp.float32) for x in arrays))


def chosen(selection: selections.Selection, cut=None) -> np.ndarray:
    cut_BT = np.zeros((B, T), bool) if cut is None else cut
    choose = jax.jit(selection.choose)
    return np.asarray(choose(tokens(), jnp.asarray(cut_BT), jnp.asarray(LOTS)))


def covariances() -> np.ndarray:
    A, logprobs = ADVANTAGES, LOGPROBS
    return (A - A[MASK].mean()) * (logprobs - logprobs[MASK].mean())


@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5])
def test_the_largest_covariances(share):
    count = max(int(share * MASK.sum()), 1)
    last = np.sort(covariances()[MASK])[-count]
    expected = MASK & (covariances() >= last)
    np.testing.assert_array_equal(chosen(selections.kl_cov(cov_share=share)), expected)
    assert expected.sum() == count


def test_a_lot_among_covariances_within_bounds():
    cut = RNG.random((B, T)) < 0.2
    selection = selections.clip_cov(cov_share=0.1, cov_low=0.1, cov_high=1.0)
    found = chosen(selection, cut)
    open_BT = MASK & ~cut & (covariances() > 0.1) & (covariances() < 1.0)
    count = int(0.1 * MASK.sum())
    assert open_BT.sum() > count == found.sum()
    np.testing.assert_array_equal(found, open_BT & (np.sort(LOTS[open_BT])[count - 1] >= LOTS))
    nothing = chosen(selections.clip_cov(cov_low=50.0, cov_high=60.0))
    assert not nothing.any()


@pytest.mark.parametrize("moment", [1e-9, 0.04, 0.3, 100.0])
def test_the_second_moment_is_below_its_bound(moment):
    """One token stays at least, and no more are removed than must be."""
    removed = chosen(selections.second_moment(moment=moment))
    square = (LOGPROBS - SAMPLER) ** 2
    kept = np.sort(square[MASK & ~removed])
    assert len(kept) == 1 or kept.mean() < moment
    if removed.any():
        assert np.append(kept, square[removed].min()).mean() >= moment
        assert square[removed].min() >= kept.max()


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_only_forks_are_learnt_from(share):
    found = chosen(selections.low_entropy(entropy_share=share))
    expected = MASK & (np.quantile(ENTROPY[MASK].astype(np.float32), 1 - share) > ENTROPY)
    np.testing.assert_array_equal(found, expected)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match="entropy_share"):
        selections.low_entropy(entropy_share=0.0)


SPECS = (
    "clip_cov?cov_share=0.2&cov_low=0.05&cov_high=2",
    "kl_cov?cov_share=0.2",
    "m2po?moment=0.3",
    "dapo?selection=low_entropy&entropy_share=0.4",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_layout_does_not_matter(spec):
    """Wider rows, more rows, in another order: a token's lot is that of its place."""
    algorithm = get_algorithm(spec, max_completion=T)
    inputs = {"mask": MASK, "old": OLD, "sampler": SAMPLER, "logprobs": LOGPROBS}
    inputs |= {"entropy": ENTROPY, "advantages": ADVANTAGES, "rewards": RNG.random(B)}
    batch, paid = batch_of(inputs), paid_of(inputs)
    plain = np.asarray(signals(algorithm, batch, paid)["chosen"])
    order = np.array([3, 0, 5, 1, 4, 2])

    def moved(x):
        x = np.asarray(x)[order]
        fill = -1 if x.min() < 0 and np.issubdtype(x.dtype, np.integer) else 0
        return jnp.asarray(np.pad(x, ((0, 2), (0, 3)), constant_values=fill))

    other = signals(algorithm, {name: moved(x) for name, x in batch.items()}, paid)["chosen"]
    np.testing.assert_array_equal(other[:B, : T + 1], plain[order])
    assert plain.any() and not np.asarray(other)[B:].any()
