"""GRPO and Dr.GRPO as objectives of the ordinary step: cut, padded and scored alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bitmask import pack_on_host
from rl.algorithms.spec import get_algorithm
from rl.objective import policy_objective
from tests import tiny
from train.scoring import logprobs_at_tokens
from train.state import TrainState
from train.step import loss_and_gradient

CONFIG = tiny.model_config(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
TRAIN = tiny.train_config(mtp_weight=0.0)
TEMPERATURE = 0.8
# Prompts padded on the left, completions of 13, 5, 1 and 9 tokens: a mean per microbatch differs
# from the global one.
LAYOUT = (
    ((0, 3), (1, 21)),
    ((0, 5), (1, 8), (0, 11)),
    ((1, 9), (0, 15)),
    ((0, 6), (1, 11), (0, 7)),
)
PROMPT = 8
# Gradients of size 1e-2 to 1, float32 sums in another order.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


@functools.cache
def rollout():
    """A batch whose old and reference policies are near the present one, so that some tokens are
    clipped.
    """
    batch = tiny.batch_of(LAYOUT)
    del batch["weights"]
    rng = np.random.default_rng(0)
    mask_BT = (batch["segments"] > 0) & (jnp.arange(tiny.T) >= PROMPT)
    batch |= {"mask": mask_BT}
    logprobs_BT = score(batch)
    near = [
        jnp.where(
            mask_BT,
            logprobs_BT + 0.3 * jnp.asarray(rng.normal(size=mask_BT.shape), jnp.float32),
            0.0,
        )
        for _ in range(2)
    ]
    advantages_BT = jnp.where(mask_BT, jnp.asarray([[1.0], [-0.5], [0.7], [-1.2]]), 0.0)
    return batch | {
        "sampler_logprobs": near[0],
        "old_logprobs": near[0],
        "reference_logprobs": near[1],
        "advantages": advantages_BT,
    }


def score(batch):
    return jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))(
        CONFIG, "sparse", TEMPERATURE, tiny.variables(CONFIG), batch
    )


@functools.cache
def compiled(algorithm: str, microbatches: int):
    objective = policy_objective(
        CONFIG, TRAIN, get_algorithm(algorithm, max_completion=16), TEMPERATURE
    )

    @jax.jit
    def run(params, router, batch):
        count = jnp.zeros((), jnp.int32)
        state = TrainState(count, params, router, (), skipped=count, skipped_in_row=count)
        gradients, means, totals = loss_and_gradient(
            objective, jax.tree.map(lambda _: True, params), state, batch, microbatches
        )
        return {
            "gradients": gradients,
            "means": means,
            "maxima": totals.maxima,
            "minima": totals.minima,
            "counts": totals.counts_LE,
        }

    return run


def gradient(algorithm, batch, microbatches=1):
    variables = tiny.variables(CONFIG)
    return compiled(algorithm, microbatches)(variables["params"], variables["router"], batch)


def only(rows):
    """The rollout with the other rows made padding, as they fill up a batch."""
    batch = tiny.without_rows(rollout(), rows)
    return batch | {"mask": batch["mask"] & (batch["segments"] > 0)}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "algorithm, microbatches",
    [pytest.param("grpo", 2, marks=pytest.mark.slow), ("grpo", 4), ("dr_grpo", 4)],
)
def test_the_gradient_does_not_depend_on_microbatches(algorithm, microbatches):
    tiny.assert_close(
        gradient(algorithm, rollout(), microbatches), gradient(algorithm, rollout()), **ROUNDING
    )


@pytest.mark.heavy
def test_the_gradient_over_supports_does_not_depend_on_microbatches():
    """Each token was drawn from some ids; the loss is another than over the whole vocabulary."""
    batch, rng = rollout(), np.random.default_rng(1)
    kept_BTV = rng.random((*batch["mask"].shape, tiny.VOCAB)) < 0.3
    np.put_along_axis(kept_BTV, np.asarray(batch["tokens"])[..., None], True, axis=-1)
    row, ids = np.nonzero((kept_BTV & np.asarray(batch["mask"])[..., None]).reshape(-1, tiny.VOCAB))
    words = pack_on_host(row, ids, batch["mask"].size, tiny.VOCAB)
    support = {"support": jnp.asarray(words.reshape(*batch["mask"].shape, -1))}
    whole = gradient("grpo", batch | support)
    tiny.assert_close(gradient("grpo", batch | support, 4), whole, **ROUNDING)
    own = gradient("grpo", batch)
    assert abs(own["means"]["ratio/mean"].total - whole["means"]["ratio/mean"].total) > 1
    tiny.assert_close(own["means"]["entropy"], whole["means"]["entropy"], rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_rows_of_padding_change_nothing(algorithm):
    """Each row alone has its own share: the totals add up over the rows, and a microbatch of
    padding rows adds nothing.
    """
    whole, parts = (
        gradient(algorithm, rollout()),
        [gradient(algorithm, only([row])) for row in range(4)],
    )
    for kind in ("means", "counts"):
        tiny.assert_close(
            jax.tree.map(lambda *leaves: sum(leaves), *(part[kind] for part in parts)),
            whole[kind],
            rtol=2e-5,
            atol=2e-5,
        )
    nothing = gradient(algorithm, only([]))
    assert tiny.tree_max((nothing["gradients"], nothing["means"], nothing["counts"])) == 0


@pytest.mark.heavy
def test_dividing_by_microbatch_would_be_seen():
    """A mean over microbatches, each over its own rows or tokens: of one row and of three."""
    mean = jax.tree.map(
        lambda *leaves: sum(leaves) / 2,
        *(gradient("grpo", only(rows))["gradients"] for rows in ([0], [1, 2, 3])),
    )
    whole = gradient("grpo", rollout())["gradients"]
    assert tiny.tree_max(jax.tree.map(jnp.subtract, mean, whole)) > 0.1 * tiny.tree_max(whole)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_equations(algorithm):
    """arXiv 2402.03300, eq. 3 and 4, and arXiv 2503.20783, section 3.2, token by token, from the
    trainer's own log-probs. Float32 sums of 30 terms.
    """
    batch = rollout()
    logprobs_BT, old_BT, reference_BT, advantages_BT, mask_BT = (
        np.asarray(x, np.float64)
        for x in (
            score(batch),
            *(batch[name] for name in ("old_logprobs", "reference_logprobs", "advantages", "mask")),
        )
    )
    policy = kl = clipped = 0.0
    for row in range(4):
        where = mask_BT[row] > 0
        divisor = where.sum() if algorithm == "grpo" else 16
        ratio, advantage = np.exp(logprobs_BT - old_BT)[row, where], advantages_BT[row, where]
        gap = (reference_BT - logprobs_BT)[row, where]
        policy -= (
            np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).sum() / divisor
        )
        kl += (np.exp(gap) - gap - 1).sum() / divisor
        clipped += np.where(advantage > 0, ratio > 1.2, ratio < 0.8).sum()
    found = gradient(algorithm, batch)
    assert clipped > 3
    expected = {"policy_loss": policy, "clip_ratio/region_mean": clipped} | (
        {"kl_loss": kl} if algorithm == "grpo" else {}
    )
    for name, value in expected.items():
        assert float(found["means"][name].total) == pytest.approx(value, rel=1e-4)
    assert float(found["means"]["policy_loss"].weight) == 4
    assert float(found["means"]["entropy"].weight) == mask_BT.sum()
    assert float(found["maxima"]["sampling/sampling_logp_difference/max"]) == pytest.approx(
        np.abs(logprobs_BT - old_BT).max(), rel=1e-4
    )


def test_token_metrics():
    """Those of TRL and verl from the trainer's own log-probs, in float64; the sampler's log-probs
    are the old ones here, and the row is one of token ratios.
    """
    batch = rollout()
    where = np.asarray(batch["mask"])
    logprobs_N, old_N, reference_N = (
        np.asarray(x, np.float64)[where]
        for x in (score(batch), batch["old_logprobs"], batch["reference_logprobs"])
    )
    log_N, to_reference_N = logprobs_N - old_N, reference_N - logprobs_N
    ratio_N, importance = np.exp(log_N), "sampling/importance_sampling_ratio"
    expected = {
        "ratio/mean": ratio_N.mean(),
        "ratio/effective_sample_size": (ratio_N**2).mean(),
        f"{importance}/mean": ratio_N.mean(),
        "rollout_corr/rollout_is_eff_sample_size": (ratio_N**2).mean(),
        "rollout_corr/kl": -log_N.mean(),
        "rollout_corr/k3_kl": (ratio_N - 1 - log_N).mean(),
        "ppo_kl": (ratio_N - 1 - log_N).mean(),
        "kl": (np.exp(to_reference_N) - 1 - to_reference_N).mean(),
        "sampling/sampling_logp_difference/mean": np.abs(log_N).mean(),
        "fresh_share": 1.0,
    }
    found = gradient("grpo", batch)
    for name, value in expected.items():
        assert float(found["means"][name].value) == pytest.approx(value, rel=1e-4), name
    for name in ("ratio", importance):
        assert float(found["minima"][f"{name}/min"]) == pytest.approx(ratio_N.min(), rel=1e-4)
        assert float(found["maxima"][f"{name}/max"]) == pytest.approx(ratio_N.max(), rel=1e-4)
    assert "kl" not in gradient("dr_grpo", batch)["means"], "nothing to compare with"


def test_the_prompt_has_no_say_in_the_loss():
    """A token of the prompt is conditioned on and never predicted: its old log-prob and advantage,
    whatever they hold, are not read.
    """
    batch = rollout()
    spoiled = {
        name: jnp.where(batch["mask"], batch[name], 7.0)
        for name in ("advantages", "old_logprobs", "reference_logprobs", "sampler_logprobs")
    }
    tiny.assert_close(gradient("grpo", batch | spoiled), gradient("grpo", batch), **ROUNDING)
