"""What is put into a completion's mouth is attended to, and no loss learns from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.spec import get_algorithm
from rl.objective import policy_objective
from rl.pay import Rewards
from rl.signals import experience_of, step_signals
from rl.trajectory import Role, batch_of
from tests import tiny
from tests.trajectories import trajectory
from train.scoring import logprobs_at_tokens
from train.state import TrainState
from train.step import loss_and_gradient

CONFIG = tiny.model_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
# The policy's loss alone: what keeps experts and indexers in order is over all that is read.
TRAIN = tiny.train_config(mtp_weight=0.0, balance_weight=0.0, indexer_weight=0.0)
PROMPT, SAMPLED = 4, 12  # tokens; the phrase is four of those behind the prompt
PHRASE = slice(PROMPT + 5, PROMPT + 9)
REWARDS = np.asarray([[[1, 0, 0, 0.5]]], np.float32)
PAID = jax.tree.map(jnp.asarray, Rewards(("own",), np.ones(1, np.float32), REWARDS).arrays(4))
PER_TOKEN = ("sampler_logprobs", "old_logprobs", "reference_logprobs")


@functools.cache
def batch(injected: bool = True) -> dict:
    """Four completions of one prompt, two of which were interrupted, and log-probs near theirs."""
    rng, made = np.random.default_rng(0), []
    for number in range(4):
        ids = rng.integers(20, tiny.VOCAB, PROMPT + SAMPLED)
        each = trajectory(ids[:PROMPT].tolist(), ids[PROMPT:].tolist())
        roles_T = each.roles_T.copy()
        if injected and number % 2:
            roles_T[PHRASE] = Role.INJECTED
        made.append(dataclasses.replace(each, roles_T=roles_T, sample=number))
    own = {name: jnp.asarray(x) for name, x in batch_of(made, tiny.T, pad=0).items()}
    score = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))
    logprobs_BT = score(CONFIG, "sparse", 1.0, tiny.variables(CONFIG), own)
    noise = 0.2 * jnp.asarray(rng.normal(size=(len(PER_TOKEN), *logprobs_BT.shape)), jnp.float32)
    near = {name: logprobs_BT + noise[n] for n, name in enumerate(PER_TOKEN)}
    return own | near


@functools.cache
def compiled(algorithm: str):
    row = get_algorithm(algorithm, max_completion=SAMPLED)
    objective = policy_objective(CONFIG, TRAIN, row, 1.0)

    @jax.jit
    def run(params, router, own):
        count = jnp.zeros((), jnp.int32)
        state = TrainState(count, params, router, (), skipped=count, skipped_in_row=count)
        own = own | step_signals(row, own, PAID)
        learns = jax.tree.map(lambda _: True, params)
        gradients, means, _ = loss_and_gradient(objective, learns, state, own, 1)
        return gradients, means, own["advantages"]

    return run


def gradient(algorithm: str, own: dict):
    variables = tiny.variables(CONFIG)
    return compiled(algorithm)(variables["params"], variables["router"], own)


@pytest.mark.heavy
@pytest.mark.parametrize("algorithm", ["scale_rl", "gspo?kl=0.1"])
def test_nothing_depends_on_the_log_probs_of_a_phrase(algorithm):
    """Of token and sequence ratios, means over tokens and over prompts, and divergences."""
    own = batch()
    phrase_BT = np.zeros(own["mask"].shape, bool)
    phrase_BT[1::2, PHRASE] = True
    other = {name: jnp.where(phrase_BT, -9.0, own[name]) for name in PER_TOKEN}
    expected, found = gradient(algorithm, own), gradient(algorithm, own | other)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)
    # And it would, if the policy had written it.
    written = gradient(algorithm, batch(injected=False) | other)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), written[0], expected[0])
    assert max(jax.tree.leaves(apart)) > 1e-3


@pytest.mark.heavy
def test_the_gradient_is_that_of_what_was_sampled():
    """By another way: of sum A log pi over the sampled tokens alone, where the ratio is 1."""
    own = batch()
    own |= {"old_logprobs": score_of(own), "sampler_logprobs": score_of(own)}
    gradients, _, advantages_BT = gradient("dr_grpo", own)
    # Dr.GRPO: r - mean of the group, over a constant, mean over completions.
    expected = np.zeros(own["mask"].shape, np.float32)
    expected[:, PROMPT : PROMPT + SAMPLED] = (REWARDS[0, 0] - REWARDS.mean())[:, None]
    expected[1::2, PHRASE] = 0
    np.testing.assert_allclose(advantages_BT, expected, atol=1e-6)

    def minus_gain(params):
        variables = tiny.variables(CONFIG) | {"params": params}
        logprobs_BT = logprobs_at_tokens(CONFIG, "sparse", 1.0, variables, own)
        return -jnp.sum(expected * logprobs_BT) / SAMPLED / len(expected)

    other = jax.jit(jax.grad(minus_gain))(tiny.variables(CONFIG)["params"])
    tiny.assert_close(gradients, other, rtol=2e-4, atol=2e-6)  # float32 sums in another order


def score_of(own: dict):
    score = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))
    return score(CONFIG, "sparse", 1.0, tiny.variables(CONFIG), own)


def test_a_phrase_counts_in_no_length():
    algorithm = get_algorithm("scale_rl", max_completion=SAMPLED)
    experience = experience_of(algorithm, batch(), PAID)
    np.testing.assert_array_equal(experience.lengths_N, [SAMPLED, SAMPLED - 4] * 2)
