"""The MTP modules draft what the forward pass predicts, whatever was drafted wrongly before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decode import keep_first, last_of, prefill, read, read_trunk
from model.decode_weights import decode_weights
from model.drafts import propose
from model.heads import logits_of
from tests import tiny

D, T = 2, tiny.T
CASES = {
    "sparse, convolution": ("sparse", tiny.model_config(num_nextn_predict_layers=D)),
    "sparse, no convolution, normed": (
        "sparse",
        tiny.model_config(num_nextn_predict_layers=D, canon_kernel_size=0, mtp_input="normed"),
    ),
    "hybrid with a convolution": (
        "dense",
        dataclasses.replace(tiny.HYBRID, num_nextn_predict_layers=D, canon_kernel_size=3),
    ),
}
PROMPTS = (1, 2, 5, 9)
# How many of the W = 3 tokens of each pass are kept, by row; 0 is a row that is not live.
KEPT = ((1, 3, 2, 0), (3, 3, 0, 1), (2, 1, 3, 1), (1, 1, 1, 2))


def row_tokens() -> jax.Array:
    """The true tokens of four rows."""
    return jnp.asarray(np.random.default_rng(3).integers(0, tiny.VOCAB, (4, T)), jnp.int32)


def at(x_BT, start_B, width):
    return jnp.take_along_axis(x_BT, start_B[:, None] + jnp.arange(width), axis=1, mode="clip")


@functools.cache
def predicted(case: str):
    """Logits of the forward pass over the true tokens, and those of each module."""
    stage, config = CASES[case]
    batch = {
        "tokens": row_tokens(),
        "positions": jnp.broadcast_to(jnp.arange(T), (4, T)),
        "segments": jnp.ones((4, T), jnp.int32),
    }
    return tiny.forward(config, tiny.variables(config), batch, stage)


@functools.partial(jax.jit, static_argnums=0)
def drafted_pass(case: str, weights, cache, keep_B):
    """One pass over true tokens, of which `keep_B` are kept. Returns what modules and trunk say."""
    stage, config = CASES[case]
    true_BW = at(row_tokens(), cache.length_B, D + 1)
    logits = []

    def pick(hidden_BD, k):
        logits.append(logits_of(config, weights.params, hidden_BD))
        # From where a row's tokens will not be kept, the drafts are wrong ones.
        return jnp.where(k < keep_B, true_BW[:, k], (true_BW[:, k] + 7) % tiny.VOCAB)

    drafts_BD, modules = propose(config, weights, cache, true_BW[:, 0], stage, pick)
    tokens_BW = jnp.concatenate([true_BW[:, :1], drafts_BD], axis=1)
    count_B = jnp.where(keep_B > 0, D + 1, 0)
    reading = read_trunk(config, weights, tokens_BW, count_B, cache, stage, every=True)
    trunk_BWV = logits_of(config, weights.params, reading.hidden_BTD)
    return keep_first(cache, modules, reading, tokens_BW, keep_B), logits, trunk_BWV


def check_pass(case: str, cache, weights, keep_B):
    """Of row b, module k has read the tokens up to n + k - 1, as the forward pass has at n - 1.

    Products of float32 matrices in another order, logits of size 1, through five layers.
    """
    expected, start_B = predicted(case), np.asarray(cache.length_B)
    cache, modules, trunk_BWV = drafted_pass(case, weights, cache, keep_B)
    for row, (start, keep) in enumerate(zip(start_B, np.asarray(keep_B), strict=True)):
        # The first module has read the token just drawn, the second the first draft too.
        for k in range(1, min(int(keep), D) + 1):
            np.testing.assert_allclose(
                modules[k - 1][row], expected["mtp_BTV"][k - 1][row, start - 1], atol=2e-4
            )
        for place in range(int(keep)):
            np.testing.assert_allclose(
                trunk_BWV[row, place], expected["logits_BTV"][row, start + place], atol=2e-4
            )
    return cache


@functools.cache
def begun(case: str):
    stage, config = CASES[case]
    variables, count_B = tiny.variables(config), jnp.asarray(PROMPTS)
    read_prompts = jax.jit(functools.partial(prefill, config, capacity=T, stage=stage, drafts=D))
    cache, *_ = read_prompts(variables, row_tokens()[:, : max(PROMPTS)], count_B)
    return cache, decode_weights(config, variables, 4 * (D + 1), drafts=D)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_modules_draft_what_the_forward_pass_predicts(case):
    """After prompts of one token and more, and passes in which some drafts were wrong."""
    cache, weights = begun(case)
    for kept in KEPT:
        cache = check_pass(case, cache, weights, jnp.asarray(kept))
    assert cache.length_B.tolist() == [p + sum(k) for p, *k in zip(PROMPTS, *KEPT, strict=True)]


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_modules_go_on_from_what_is_read(case):
    """Chunks of other lengths in each row, from none on, between two passes."""
    stage, config = CASES[case]
    cache, weights = begun(case)
    cache = check_pass(case, cache, weights, jnp.asarray(KEPT[0]))
    for counts in ((4, 0, 1, 2), (0, 3, 1, 0)):
        tokens_BT, count_B = at(row_tokens(), cache.length_B, 4), jnp.asarray(counts)
        cache, hidden_BTD, *_ = read(config, weights, tokens_BT, count_B, cache, stage)
        last_BD = last_of(hidden_BTD, count_B)
        for row in np.flatnonzero(counts):
            np.testing.assert_allclose(
                logits_of(config, weights.params, last_BD)[row],
                predicted(case)["logits_BTV"][row, int(cache.length_B[row]) - 1],
                atol=2e-4,
            )
    for kept in KEPT[1:3]:
        cache = check_pass(case, cache, weights, jnp.asarray(kept))


@pytest.mark.heavy
def test_modules_go_on_where_tokens_were_taken_back():
    """The rows are read again from W tokens before."""
    case = "sparse, no convolution, normed"
    stage, config = CASES[case]
    cache, weights = begun(case)
    for kept in KEPT[:3]:
        cache = check_pass(case, cache, weights, jnp.asarray(kept))
    back_B = jnp.asarray([2, 1, 0, 1])
    kept_B = jnp.where(back_B > 0, cache.length_B - back_B - (D + 1), cache.length_B)
    count_B = jnp.where(back_B > 0, D + 1, 0)
    tokens_BT = at(row_tokens(), kept_B, D + 1)
    cache = read(config, weights, tokens_BT, count_B, cache.cut(kept_B), stage).cache
    for kept in KEPT[1:3]:
        cache = check_pass(case, cache, weights, jnp.asarray(kept))
