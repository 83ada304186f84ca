"""What a model says of the tokens of a batch: log-probs by a forward pass, a part at a time."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.heads import token_logprobs
from model.record import replay
from model.segments import shift_left
from model.transformer import Output, Transformer
from train.objective import Batch, split_microbatches


def predicted(batch: Batch, name: str) -> Array:
    """Returns an array of the batch, [B, T], moved to where its tokens are predicted.

    Position t then has the value of token t + 1, and the last position has 0.
    """
    return shift_left(batch[name], 1)


def forward_logprobs(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: Batch
) -> tuple[Array, Array, Output]:
    """Runs the model and scores the next token at each position.

    Where the batch has "routes" or "selected", tokens go to those experts and attend to those keys;
    where it has "support", log-probs are those of the distribution over it.

    Args:
      stage: "dense" or "sparse" attention.
      temperature: of sampling; 0 (greedy) reads as 1, as the sampler's own log-probs do.

    Returns:
      Log-probs and entropy [B, T], float32 in nats, and the output of the forward pass.
    """
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    given = variables | replay(config, batch.get("routes"), batch.get("selected"))
    output = cast(Output, Transformer(config).apply(given, *inputs, stage=stage, mtp=False))
    logprobs_BT, entropy_BT = token_logprobs(
        config,
        variables["params"],
        output.hidden_BTD,
        predicted(batch, "tokens"),
        temperature or 1.0,
        predicted(batch, "support") if "support" in batch else None,
    )
    return logprobs_BT, entropy_BT, output


def scores_at_tokens(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: Batch
) -> tuple[Array, Array]:
    """Returns the log-prob of each token of the mask and the entropy it was drawn from, [B, T].

    Each is at the token itself, and 0 elsewhere.

    Args:
      batch: with "mask", bool [B, T].
    """
    found = forward_logprobs(config, stage, temperature, variables, batch)[:2]

    def at_token(x_BT: Array) -> Array:
        return jnp.where(batch["mask"], jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0))), 0.0)

    logprobs_BT, entropy_BT = map(at_token, found)
    return logprobs_BT, entropy_BT


def logprobs_at_tokens(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: Batch
) -> Array:
    """Returns the first of `scores_at_tokens`, [B, T]."""
    return scores_at_tokens(config, stage, temperature, variables, batch)[0]


def in_parts(score: Callable[[dict, Batch], Any], parts: int) -> Callable[[dict, Batch], Any]:
    """Makes a function of a batch compute it in so many parts, one after the other.

    So scoring takes no more memory than a microbatch of an update.

    Args:
      score: (variables, batch) -> arrays [B, T].
    """

    def scored(variables: dict, batch: Batch) -> Any:
        if parts == 1:
            return score(variables, batch)
        found = jax.lax.map(functools.partial(score, variables), split_microbatches(batch, parts))
        # Part p has the rows p, p + parts, ...
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch["tokens"].shape), found)

    return scored
