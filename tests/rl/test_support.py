"""The ids that a token was drawn from are recorded, and the trainer compares over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.compared import compared_logprobs
from rl.config import ReinforceConfig, SamplingConfig
from rl.engine import Engine
from rl.halting import StopSequences
from rl.records import kept_records, support_words
from rl.trajectory import Role, Trajectory, batch_of
from tests import tiny
from tests.rl.test_draw import brute_force
from tests.rl.test_engine import MESH, MODELS, assert_same, by_number
from tests.rl.test_turns import NEW, WIDTH, conversation, prompts_of
from train.scoring import logprobs_at_tokens

CONFIG = MODELS["mla"]
FORBIDDEN = (21, 34)
SAMPLING = SamplingConfig(
    temperature=0.7, top_k=20, top_p=0.9, max_prompt_tokens=WIDTH, max_new_tokens=NEW
)

score = jax.jit(functools.partial(logprobs_at_tokens, CONFIG, "sparse", SAMPLING.temperature))


@functools.cache
def conversations(steps: int = 3) -> dict[tuple[int, int], Trajectory]:
    """With turns, ids that are forbidden until the first, and tokens that are taken back."""
    own = Engine(CONFIG, MESH, SAMPLING, rows=4, steps=steps, record=["support", "selected"])
    own.load(tiny.variables(CONFIG))
    halts = StopSequences(tuple((n,) for n in range(30, 40)))
    options = {"reply": conversation(3, turns=2), "halts": halts, "forbidden": FORBIDDEN}
    return by_number(own.run(prompts_of(**options)))


@functools.cache
def batch() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, batch_of(list(conversations().values()), WIDTH + NEW, pad=0))


@pytest.mark.heavy
def test_the_record_is_what_a_loop_keeps():
    """Of the logits of a forward pass; all ids for what was not sampled."""
    logits_BTV = tiny.forward(CONFIG, tiny.variables(CONFIG), batch(), "sparse")["logits_BTV"]
    for each, logits_TV in zip(conversations().values(), np.asarray(logits_BTV), strict=True):
        assert each.support_T is not None and each.support_T.width == tiny.VOCAB
        counts_T = each.support_T.counts_TL[:, 0]
        assert (counts_T[~each.sampled_T] == tiny.VOCAB).all()
        kept_TL = each.support_T.lists()
        for t in np.flatnonzero(each.sampled_T):
            logits_V = logits_TV[t - 1].astype(np.float64) / SAMPLING.temperature
            if not (each.roles_T[:t] == Role.TOOL).any():
                logits_V[list(FORBIDDEN)] = -np.inf
            logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
            kept = np.flatnonzero(brute_force(logprobs_V, SAMPLING.top_k, SAMPLING.top_p))
            assert each.tokens_T[t] in kept
            np.testing.assert_array_equal(kept_TL[t, 0, : counts_T[t]], kept)


@pytest.mark.heavy
def test_a_policy_that_has_not_moved_has_ratio_one():
    """Its log-probs over the support are the sampler's, prompts, turns and all; not so without."""
    assert jnp.any(batch()["log_kept"] < -0.01)
    scored_BT = score(tiny.variables(CONFIG), batch())
    tiny.assert_close(scored_BT, batch()["sampler_logprobs"], atol=1e-5)
    tiny.assert_close(jnp.exp(scored_BT - batch()["sampler_logprobs"]), 1.0, atol=1e-5)
    whole = batch_of(list(conversations().values()), WIDTH + NEW, pad=0, records=["selected"])
    whole = jax.tree.map(jnp.asarray, whole)
    tiny.assert_close(
        batch()["sampler_logprobs"], whole["sampler_logprobs"] - whole["log_kept"], atol=1e-6
    )
    tiny.assert_close(score(tiny.variables(CONFIG), whole), whole["sampler_logprobs"], atol=1e-5)


@pytest.mark.heavy
def test_a_reference_is_compared_over_the_same_support():
    """It chooses keys for itself: with the policy's weights and choices it has its log-probs."""
    compared = compared_logprobs(
        score, tiny.variables(CONFIG), tiny.variables(CONFIG), batch(), "trainer", updates=2
    )
    tiny.assert_close(compared["old_logprobs"], compared["reference_logprobs"], atol=1e-5)


@pytest.mark.heavy
def test_the_record_depends_on_no_schedule():
    for number, each in conversations(5).items():
        assert_same(each, conversations()[number])


def test_the_mask_is_kept_where_sampling_restricts():
    config, choices = ReinforceConfig(), frozenset(["routes", "selected"])
    for sampling, restricts in (
        (SamplingConfig(), False),
        (SamplingConfig(top_k=5), True),
        (SamplingConfig(top_p=0.9), True),
        (SamplingConfig(temperature=0.0, top_p=0.9), False),
    ):
        kept = kept_records(choices, sampling, config)
        assert kept == {"selected"} | ({"support"} if restricts else set())
    without = ReinforceConfig(keep_sampling_mask=False)
    assert kept_records(choices, SamplingConfig(top_k=5), without) == {"selected"}


def test_supports_become_bitmasks():
    """None is set where nothing was left out, and behind the end of a row."""
    each = next(iter(conversations().values()))
    assert each.support_T is not None
    words_TW = support_words(each.support_T)
    np.testing.assert_array_equal(words_TW.any(axis=-1), each.sampled_T)
    row = np.asarray(batch()["support"][0])
    np.testing.assert_array_equal(row[: len(words_TW)], words_TW)
    assert not row[len(words_TW) :].any()
