"""From prompts and their completions to a batch to learn from.

Tokens in, tokens out: what was sampled is what is trained on, and never tokenised again.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from data.padding import pad_rows
from errors import UserError
from rl.sampler import Completions


@dataclasses.dataclass(frozen=True)
class Prompts:
    """P prompts, padded on the left so that each ends in the last column.

    tokens_PT: int32 ids.
    segments_PT: int32, 1 on tokens and 0 on padding.
    """

    tokens_PT: np.ndarray
    segments_PT: np.ndarray


def pad_prompts(prompts: list[list[int]], width: int, pad: int) -> Prompts:
    """Pads prompts on the left to `width` tokens.

    Raises:
      UserError: a prompt is longer than `width`, which is sampling.max_prompt_tokens.
    """
    longest = max(map(len, prompts), default=0)
    if longest > width:
        raise UserError(
            f"sampling.max_prompt_tokens = {width}: a prompt has {longest} tokens; "
            "raise it to at least that"
        )
    return Prompts(*pad_rows(prompts, width, pad, side="left"))


def policy_batch(
    prompts_PT: Array, segments_PT: Array, completions: Completions, group: int
) -> dict[str, Array]:
    """Puts each completion behind its prompt, as a batch of B = P * group rows.

    Args:
      prompts_PT, segments_PT: left-padded prompts.
      completions: row p * group + g is the g-th completion of prompt p, C tokens long.

    Returns:
      Arrays [B, T + C]: tokens, positions and segments as in pretraining; mask, bool, true on
      sampled tokens; sampler_logprobs, float32, 0 elsewhere. Each stands at the token itself.
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
