"""A rollout becomes a batch: prompts on the left, the sampled tokens behind them."""

import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from rl.rollout import pad_prompts, policy_batch
from rl.sampler import Completions


def test_prompts_are_padded_on_the_left():
    prompts = pad_prompts([[4, 5], [6, 7, 8]], width=3, pad=1)
    np.testing.assert_array_equal(prompts.tokens_PT, [[1, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(prompts.segments_PT, [[0, 1, 1], [1, 1, 1]])


def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(UserError, match=r"sampling.max_prompt_tokens = 3: a prompt has 4 tokens"):
        pad_prompts([[1], [1, 2, 3, 4]], width=3, pad=0)


def test_policy_batch_by_hand():
    """Two prompts, two completions each; the ids are the sampled ones, and a completion that
    stopped early is padding from there on.
    """
    prompts = pad_prompts([[4, 5], [6, 7, 8]], width=3, pad=1)
    mask_BC = jnp.asarray([[1, 1], [1, 0], [1, 1], [1, 0]], bool)
    completions = Completions(
        jnp.asarray([[10, 11], [12, 1], [13, 14], [15, 1]]), mask_BC, -1.0 * mask_BC
    )
    batch = policy_batch(
        jnp.asarray(prompts.tokens_PT), jnp.asarray(prompts.segments_PT), completions, group=2
    )
    np.testing.assert_array_equal(
        batch["tokens"], [[1, 4, 5, 10, 11], [1, 4, 5, 12, 1], [6, 7, 8, 13, 14], [6, 7, 8, 15, 1]]
    )
    np.testing.assert_array_equal(
        batch["segments"], [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    )
    real = np.asarray(batch["segments"]) > 0
    np.testing.assert_array_equal(
        np.where(real, batch["positions"], 0),
        [[0, 0, 1, 2, 3], [0, 0, 1, 2, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]],
    )
    np.testing.assert_array_equal(batch["mask"], np.pad(mask_BC, ((0, 0), (3, 0))))
    np.testing.assert_array_equal(
        batch["sampler_logprobs"], -1.0 * np.pad(mask_BC, ((0, 0), (3, 0)))
    )
