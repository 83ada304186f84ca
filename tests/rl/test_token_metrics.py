"""What an update measures of its tokens: over which of them, and that microbatches add up."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.sequences import Sequences
from rl.algorithms.spec import get_algorithm
from rl.algorithms.surrogates import Gain
from rl.algorithms.tokens import Tokens
from rl.token_metrics import FRESH_SHARE, LOGP_DIFFERENCE, Measured, mean_names, token_totals

B, T = 3, 7
NAMES = mean_names(get_algorithm("grpo", max_completion=T))


def measured(rows: slice = slice(None)) -> tuple[Measured, np.ndarray, dict[str, np.ndarray]]:
    """Random tokens, of which the last row is padding; which of them are fresh; and the numbers."""
    rng = np.random.default_rng(0)
    numbers_BT = rng.integers(0, 2, (B, T))
    numbers_BT[-1] = 0
    mask_BT = numbers_BT > 0
    names = ("logprobs", "old", "sampler", "reference", "entropy")
    x = {name: rng.normal(size=(B, T)).astype(np.float32) for name in names}
    fresh_BT = mask_BT & (rng.random((B, T)) < 0.5)
    low_BT = rng.random((B, T)) < 0.3
    tokens = Tokens(
        Sequences(jnp.asarray(numbers_BT[rows]), jnp.ones(len(numbers_BT[rows]), jnp.int32)),
        logprobs_BT=jnp.asarray(x["logprobs"][rows]),
        entropy_BT=jnp.asarray(x["entropy"][rows]),
        old_BT=jnp.asarray(x["old"][rows]),
        sampler_BT=jnp.asarray(x["sampler"][rows]),
        advantages_BT=jnp.zeros_like(x["old"][rows]),
        reference_BT=jnp.asarray(x["reference"][rows]),
    )
    gain = Gain(tokens.old_BT, jnp.asarray(low_BT[rows]), jnp.zeros_like(low_BT[rows]))
    found = Measured(tokens, jnp.exp(tokens.log_ratio_BT), gain)
    return found, fresh_BT[rows], x | {"mask": mask_BT, "fresh": fresh_BT, "low": low_BT}


def test_totals_are_over_the_tokens_that_are_learnt_from():
    found, fresh_BT, x = measured()
    sums, maxima, minima = token_totals(found, jnp.asarray(fresh_BT), NAMES)
    mask_BT = x["mask"]
    log_N = (x["logprobs"] - x["sampler"])[mask_BT].astype(np.float64)
    ratio_N = np.exp((x["logprobs"] - x["old"])[mask_BT].astype(np.float64))
    away_N = (x["reference"] - x["logprobs"])[mask_BT].astype(np.float64)
    gap_N = np.abs(x["logprobs"] - x["sampler"])[x["fresh"]]
    importance = "sampling/importance_sampling_ratio"
    low = x["low"][mask_BT].sum()
    expected = {
        "entropy": x["entropy"][mask_BT].sum(),
        "clip_ratio/region_mean": low,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": 0,
        "ratio/mean": ratio_N.sum(),
        "ratio/effective_sample_size": (ratio_N**2).sum(),
        "ppo_kl": (ratio_N - 1 - np.log(ratio_N)).sum(),
        f"{importance}/mean": np.exp(log_N).sum(),
        "rollout_corr/rollout_is_eff_sample_size": np.exp(2 * log_N).sum(),
        "rollout_corr/kl": -log_N.sum(),
        "rollout_corr/k3_kl": (np.exp(log_N) - 1 - log_N).sum(),
        "kl": (np.exp(away_N) - 1 - away_N).sum(),
        FRESH_SHARE: len(gap_N),
        f"{LOGP_DIFFERENCE}/mean": gap_N.sum(),
    }
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, rel=1e-5)
    assert {name: float(value) for name, value in maxima.items()} == pytest.approx({
        f"{LOGP_DIFFERENCE}/max": gap_N.max(), "ratio/max": ratio_N.max(),
        f"{importance}/max": np.exp(log_N).max(),
    }, rel=1e-5)  # fmt: skip
    assert {name: float(value) for name, value in minima.items()} == pytest.approx({
        "ratio/min": ratio_N.min(), f"{importance}/min": np.exp(log_N).min(),
    }, rel=1e-5)  # fmt: skip


def test_a_microbatch_of_padding_adds_nothing():
    whole, padding = measured(), measured(slice(B - 1, B))
    _, maxima, minima = token_totals(whole[0], jnp.asarray(whole[1]), NAMES)
    sums, none_above, none_below = token_totals(padding[0], jnp.asarray(padding[1]), NAMES)
    assert not any(map(float, sums.values()))
    assert all(none_above[name] < value for name, value in maxima.items())
    assert all(none_below[name] > value for name, value in minima.items())


def test_without_a_reference_there_is_no_distance_from_it():
    assert "kl" not in mean_names(get_algorithm("dr_grpo", max_completion=T))
