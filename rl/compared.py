"""What a loss compares the policy with: the policy before it moved, and a reference."""

import functools
from collections.abc import Callable, Collection

import jax
from jax import Array

from kernels.device import compiler_options
from model.record import CHOICES
from rl.clock import Parts
from train.objective import Batch
from train.scoring import in_parts, logprobs_at_tokens, scores_at_tokens
from train.setup import Setup


def jit_score(
    setup: Setup, stage: str, temperature: float, parts: int, *, entropy: bool = False
) -> Callable[..., Array]:
    """Returns the jitted (variables, batch) -> log-probs [B, T] of the tokens of the mask.

    Args:
      parts: see `train.scoring.in_parts`.
      entropy: returns log-probs and entropies of the distributions they are of.
    """
    of_batch = scores_at_tokens if entropy else logprobs_at_tokens
    score = functools.partial(of_batch, setup.model, stage, temperature)
    return jax.jit(in_parts(score, parts), compiler_options=compiler_options(setup.mesh))


def compared_logprobs(
    score_fn: Callable[..., Array],
    variables: dict,
    reference: dict | None,
    batch: Batch,
    old_logprobs: str,
    updates: int,
    needs: Collection[str] = (),
    parts: Parts | None = None,
) -> Batch:
    """Returns what the loss compares the policy's log-probs with, [B, T] each.

    "old_logprobs" are those the sampler recorded or those the trainer computes. With the latter
    goes "on_policy", bool [B]: in the first of the step's updates, `rl.objective.old_of` takes the
    policy's own; where it is the only one, and nothing else needs them, nothing need be scored.
    "reference_logprobs" are there where there is a reference, which chooses experts and keys for
    itself.

    Args:
      needs: of an algorithm.
      parts: what the parts "old_log_prob" and "ref" are measured by.
    """
    parts = parts or Parts()
    compared = {"old_logprobs": batch["sampler_logprobs"]}
    if old_logprobs == "trainer":
        compared["on_policy"] = batch["mask"][:, 0] | True
        if updates > 1 or "old" in needs:
            with parts("old_log_prob"):
                compared["old_logprobs"] = parts.until(score_fn(variables, batch))
    if reference is not None:
        own = {name: x for name, x in batch.items() if name not in CHOICES}
        with parts("ref"):
            compared["reference_logprobs"] = parts.until(score_fn(reference, own))
    return compared


def left_policy(batch: Batch) -> Batch:
    """Returns a part of a batch for an update after the first, which old log-probs are older than.

    Its sharding stays: another would be another program to compile.
    """
    if "on_policy" not in batch:
        return batch
    return batch | {"on_policy": batch["on_policy"] & False}
