"""The sampler's record is what the trainer computes, and its draws are what the record says."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import sampler
from rl.config import SamplingConfig
from rl.objective import logprobs_at_tokens
from rl.rollout import pad_prompts, policy_batch
from rl.sampler import draw, keep_likely, keys_of, sample, stream
from tests import tiny

CONFIG = tiny.model_config(num_nextn_predict_layers=0, initializer_range=0.15)
GROUP, NEW, WIDTH = 2, 8, 16
STOP, PAD = (5, 6, 7, 8, 9, 10, 11, 12), 0
PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45], [23, 24]]

sample = jax.jit(sample, static_argnums=(0, 1, 2, 3, 8))
logprobs_at_tokens = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))


def sampling(**changes) -> SamplingConfig:
    plain = SamplingConfig(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_prompt_tokens=WIDTH,
        max_new_tokens=NEW,
        attention="sparse",
        attention_top_p=1.0,
    )
    return dataclasses.replace(plain, **changes)


def sampled(settings: SamplingConfig, prompts=PROMPTS, seed: int = 0, numbers=(0, 1, 2)):
    """Returns the padded prompts, tokens and segments, and their completions."""
    padded = on_device(prompts)
    model = CONFIG, settings, STOP, PAD, tiny.variables(CONFIG)
    return padded, sample(*model, *padded, keys_of(jax.random.key(seed), numbers), GROUP)


def on_device(prompts: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    padded = pad_prompts(prompts, WIDTH, PAD)
    return jnp.asarray(padded.tokens_PT), jnp.asarray(padded.segments_PT)


SETTINGS = {
    "sparse": sampling(temperature=0.7, top_k=20, top_p=0.9),
    "dense": sampling(attention="dense"),
    "greedy": sampling(temperature=0.0),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_the_record_is_what_the_trainer_computes(name):
    """Tokens of rows of three lengths, stopped at different places; float32 log-probs of size 1 to
    10 through three layers.
    """
    settings = SETTINGS[name]
    padded, found = sampled(settings)
    batch = policy_batch(*padded, found, GROUP)
    scored = logprobs_at_tokens(
        CONFIG, settings.attention, settings.temperature, tiny.variables(CONFIG), batch
    )
    tiny.assert_close(scored, batch["sampler_logprobs"], atol=1e-5)
    assert jnp.all((batch["sampler_logprobs"] < 0) == batch["mask"])


def test_rows_end_at_a_stop_token():
    _, found = sampled(SETTINGS["dense"])
    lengths_B = np.asarray(found.mask_BC).sum(axis=1)
    assert len(set(lengths_B)) > 1, "some stop, some do not"
    for row, length in enumerate(lengths_B):
        tokens_C = np.asarray(found.tokens_BC[row])
        assert found.mask_BC[row, :length].all() and not np.isin(tokens_C[: length - 1], STOP).any()
        assert length == NEW or tokens_C[length - 1] in STOP
        assert (tokens_C[length:] == PAD).all() and not found.logprobs_BC[row, length:].any()


def test_the_loop_ends_with_the_last_row(monkeypatch):
    """When every token is a stop token one step is made, not eight."""
    steps = []

    def counting(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    decode_step = sampler.decode_step
    monkeypatch.setattr(sampler, "decode_step", counting)
    everything = tuple(range(tiny.VOCAB))
    once = jax.jit(functools.partial(sampler.sample, CONFIG, SETTINGS["dense"], everything, PAD))
    keys_P = keys_of(jax.random.key(0), range(3))
    found = once(tiny.variables(CONFIG), *on_device(PROMPTS), keys_P)
    jax.effects_barrier()
    assert len(steps) == 1
    chex.assert_trees_all_equal(jnp.sum(found.mask_BC, axis=1), jnp.ones(3, jnp.int32))


def test_greedy_takes_the_likeliest_token():
    """Of the full forward pass, over prompt and completion; and the rows of a group are one and the
    same.
    """
    padded, found = sampled(SETTINGS["greedy"])
    batch = policy_batch(*padded, found, GROUP)
    logits_BTV = tiny.forward(CONFIG, tiny.variables(CONFIG), batch, "sparse")["logits_BTV"]
    likeliest_BC = jnp.argmax(logits_BTV, axis=-1)[:, WIDTH - 1 : -1]
    chex.assert_trees_all_equal(jnp.where(found.mask_BC, likeliest_BC, PAD), found.tokens_BC)
    chex.assert_trees_all_equal(found.tokens_BC[::2], found.tokens_BC[1::2])


def test_a_stream_yields_the_tokens_that_are_sampled():
    """Greedily, so that keys do not matter; it too ends with the last row."""
    settings = SETTINGS["greedy"]
    padded, found = sampled(settings)
    model = CONFIG, settings, STOP, PAD, tiny.variables(CONFIG)
    columns = list(stream(*model, *padded, jax.random.key(0)))
    assert len(columns) == np.asarray(found.mask_BC).sum(axis=1).max()
    chex.assert_trees_all_equal(
        jnp.stack(columns, axis=1), found.tokens_BC[::GROUP, : len(columns)]
    )


def test_rows_of_a_stream_draw_alike():
    """So the devices that rows are spread over all write the same."""
    model = CONFIG, SETTINGS["dense"], STOP, PAD, tiny.variables(CONFIG)
    for tokens_B in stream(*model, *on_device([PROMPTS[0]] * 2), jax.random.key(0)):
        assert tokens_B[0] == tokens_B[1]


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_what_a_row_samples_does_not_depend_on_the_others(name):
    _, found = sampled(SETTINGS[name])
    _, other = sampled(SETTINGS[name], [PROMPTS[0], [50, 51, 52, 53, 54], [55]])
    first = functools.partial(jax.tree.map, lambda x_BC: x_BC[:GROUP])
    chex.assert_trees_all_equal(first(other).tokens_BC, first(found).tokens_BC)
    # Matrix products of other shapes.
    chex.assert_trees_all_close(first(other), first(found), atol=1e-5)
    assert jnp.any(other.tokens_BC[GROUP:] != found.tokens_BC[GROUP:])


def test_what_a_row_samples_depends_on_its_number_and_not_on_its_place():
    _, found = sampled(SETTINGS["dense"])
    _, other = sampled(SETTINGS["dense"], PROMPTS[::-1], numbers=(2, 1, 0))
    groups = np.asarray(other.tokens_BC).reshape(3, GROUP, NEW)
    np.testing.assert_array_equal(groups[::-1].reshape(-1, NEW), found.tokens_BC)
    _, moved = sampled(SETTINGS["dense"], numbers=(3, 4, 5))
    assert jnp.any(moved.tokens_BC != found.tokens_BC)


def test_seeds_and_rows_differ():
    _, found = sampled(SETTINGS["dense"])
    assert jnp.any(sampled(SETTINGS["dense"], seed=1)[1].tokens_BC != found.tokens_BC)
    assert jnp.any(found.tokens_BC[0] != found.tokens_BC[1]), "two completions of one prompt"
    chex.assert_trees_all_equal(sampled(SETTINGS["dense"])[1], found)


def brute_force(logprobs_V, top_k, top_p):
    """Token by token, likeliest first, until k are kept or those kept hold top_p of what the first
    k hold.
    """
    order = np.argsort(-logprobs_V)[: top_k or None]
    probs = np.exp(logprobs_V[order]) / np.exp(logprobs_V[order]).sum()
    kept, total = np.zeros(len(logprobs_V), bool), 0.0
    for token, prob in zip(order, probs, strict=True):
        if total >= top_p:
            break
        kept[token], total = True, total + prob
    return kept


@pytest.mark.parametrize("compiled", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_kept_are_those_of_brute_force(compiled):
    logprobs_BV = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(0), (6, 30)))
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.8), (5, 0.6), (1, 0.5), (40, 0.05)):
        keep = compiled(functools.partial(keep_likely, top_k=top_k, top_p=top_p))
        expected_BV = [brute_force(row, top_k, top_p) for row in np.asarray(logprobs_BV)]
        np.testing.assert_array_equal(keep(logprobs_BV), expected_BV)


@pytest.mark.parametrize("top_k, top_p", [(2, 1.0), (0, 0.4)])
def test_ties_are_all_kept(top_k, top_p):
    logprobs_BV = jnp.log(jnp.asarray([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    kept_BV = keep_likely(logprobs_BV, top_k, top_p)
    np.testing.assert_array_equal(kept_BV, [[True, True, True, True, False]])


def test_draws_follow_the_truncated_distribution():
    """50,000 draws of one row. Log-probs are those of the whole vocabulary; what is drawn from is
    their distribution over the tokens kept.
    """
    logits_V = jnp.asarray([2.0, 1.5, 1.0, 0.0, -1.0])
    settings = sampling(temperature=0.5, top_k=4, top_p=0.9)
    draws = 50_000
    tokens_B, logprobs_B = draw(
        settings, jnp.broadcast_to(logits_V, (draws, 5)), jax.random.split(jax.random.key(0), draws)
    )
    logprobs_V = np.asarray(jax.nn.log_softmax(logits_V / 0.5))
    kept_V = brute_force(logprobs_V, 4, 0.9)
    assert 1 < kept_V.sum() < 4
    np.testing.assert_allclose(logprobs_B, logprobs_V[tokens_B], atol=1e-6)
    expected_V = np.where(kept_V, np.exp(logprobs_V), 0) / np.exp(logprobs_V[kept_V]).sum()
    # Four standard deviations of a frequency over 50,000 draws: 4 * sqrt(0.25 / 50,000).
    np.testing.assert_allclose(np.bincount(tokens_B, minlength=5) / draws, expected_V, atol=9e-3)
