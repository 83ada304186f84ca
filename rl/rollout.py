"""From prompts to a batch to learn from: completions, their rewards and advantages, with the
log-probs they were sampled with. Tokens in, tokens out: what was sampled is what is trained on,
never re-tokenised.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from errors import UserError
from rl.sampler import Completions


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: tokens_PT and segments_PT int32 (0 is padding)."""

    tokens_PT: np.ndarray
    segments_PT: np.ndarray


def pad_prompts(prompts: list[list[int]], width: int, pad: int) -> Prompts:
    """Raises UserError for a prompt longer than `width` (sampling.max_prompt_tokens)."""
    tokens_PT = np.full((len(prompts), width), pad, np.int32)
    segments_PT = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        if len(ids) > width:
            raise UserError(
                f"sampling.max_prompt_tokens = {width}: a prompt has {len(ids)} tokens; raise it to at least that"
            )
        tokens_PT[row, width - len(ids) :] = ids
        segments_PT[row, width - len(ids) :] = 1
    return Prompts(tokens_PT, segments_PT)


def policy_batch(
    prompts_PT: Array, segments_PT: Array, completions: Completions, group: int
) -> dict[str, Array]:
    """The rollout as a batch, prompt then completion, [B, T + C] each:

    tokens, positions, segments, as in pretraining; mask (bool, true on completion tokens),
    sampler_logprobs (0 elsewhere), both at the token itself.
    """
    tokens_BT = jnp.repeat(prompts_PT, group, axis=0)
    prompt_segments_BT = jnp.repeat(segments_PT, group, axis=0)
    nothing_BT = jnp.zeros(tokens_BT.shape, bool)
    segments = jnp.concatenate([prompt_segments_BT, completions.mask_BC.astype(jnp.int32)], axis=1)
    return {
        "tokens": jnp.concatenate([tokens_BT, completions.tokens_BC], axis=1),
        "positions": jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0).astype(jnp.int32),
        "segments": segments,
        "mask": jnp.concatenate([nothing_BT, completions.mask_BC], axis=1),
        "sampler_logprobs": jnp.concatenate(
            [nothing_BT.astype(jnp.float32), completions.logprobs_BC], axis=1
        ),
    }
