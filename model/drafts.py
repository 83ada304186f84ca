"""Drafting by the MTP modules: tokens that the trunk then verifies, several in one pass.

The k-th module predicts the token k + 1 places on (arXiv 2412.19437, section 2.2; section 5.4.3 has
them draft). At position t it reads what the module before it made there, and the token at t + k.
With n tokens read and the next one drawn, the modules go over the last W = D + 1 positions, n - W
to n - 1: the tokens behind the drawn one are the drafts so far, so that the last position of module
k gives draft k. Positions before n - W are in their caches, and have only true tokens in them,
however many drafts turn out wrong.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from model.cache import Cache, DraftCache, LayerCache, token_info
from model.config import ModelConfig
from model.decode_weights import DecodeWeights
from model.heads import embed
from model.layers.norm import RMSNorm
from model.segments import TokenInfo
from model.transformer import MTPModule


def follow(
    config: ModelConfig,
    weights: DecodeWeights,
    cache: Cache,
    further_BTD: Array,
    tokens_BT: Array,
    count_B: Array,
    stage: str,
) -> DraftCache:
    """Returns the modules' caches after the trunk has read the next tokens.

    Args:
      cache: as it was before these tokens.
      further_BTD: what the trunk gave the first module to read, see `model.decode.Reading`.
      tokens_BT, count_B, stage: as of `model.decode.read`.
    """
    drafts = cache.drafts
    assert drafts is not None
    T, W = tokens_BT.shape[1], drafts.depth + 1
    place_T = jnp.arange(T)
    real_BT = (place_T < count_B[:, None]) & (place_T >= W - drafts.known_B[:, None])
    tokens = token_info(cache.length_B - W, real_BT, cache.capacity, stage)
    previous_BTD = jnp.concatenate([drafts.further_BWD, further_BTD], axis=1)[:, :T]
    ids_BS = jnp.concatenate([drafts.tokens_BW, tokens_BT], axis=1)
    layers = []
    for k, past in enumerate(drafts.layers, start=1):
        previous_BTD, _, written = run_module(
            config, weights, k, previous_BTD, ids_BS[:, k : k + T], tokens, past
        )
        layers.append(written)
    return dataclasses.replace(drafts, layers=tuple(layers)).slid(further_BTD, tokens_BT, count_B)


def propose(
    config: ModelConfig,
    weights: DecodeWeights,
    cache: Cache,
    token_B: Array,
    stage: str,
    pick: Callable[[Array, int], Array],
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Drafts D tokens behind the next one.

    Args:
      cache: what the rows have read.
      token_B: the next token of each row, which has not been read.
      pick: (hidden states [B, D] for the output head, k) -> the ids of draft k.

    Returns: the ids [B, D], and the modules' caches with the state after each of the W positions
    that they went over, see `model.cache.Cache.after`.
    """
    drafts = cache.drafts
    assert drafts is not None
    W = drafts.depth + 1
    real_BW = jnp.arange(W) >= W - drafts.known_B[:, None]
    tokens = token_info(cache.length_B - W, real_BW, cache.capacity, stage, every=True)
    previous_BWD, ids_BS = drafts.further_BWD, jnp.append(drafts.tokens_BW, token_B[:, None], 1)
    layers = []
    for k, past in enumerate(drafts.layers, start=1):
        previous_BWD, hidden_BWD, written = run_module(
            config, weights, k, previous_BWD, ids_BS[:, k:], tokens, past
        )
        layers.append(written)
        ids_BS = jnp.append(ids_BS, pick(hidden_BWD[:, -1], k)[:, None], 1)
    return ids_BS[:, W + 1 :], tuple(layers)


def run_module(
    config: ModelConfig,
    weights: DecodeWeights,
    k: int,
    previous_BTD: Array,
    ahead_BT: Array,
    tokens: TokenInfo,
    past: LayerCache,
) -> tuple[Array, Array, LayerCache]:
    """Runs the k-th module over some positions.

    Args:
      previous_BTD: what the module before made there.
      ahead_BT: the tokens k places on.
      tokens: of these positions.

    Returns: what the next module reads, the hidden states for the output head, and its cache.
    """
    with jax.named_scope(f"mtp_{k}"):
        embedded_BTD = embed(config, weights.params["embedding"], ahead_BT)
        previous_BTD, module = weights.module(k - 1, previous_BTD, config.moe.num_experts)
        applied: Any = MTPModule(config).apply(module, previous_BTD, embedded_BTD, tokens, past)
        x_BTD, (_, written) = applied
        hidden_BTD = normed(config, weights, f"mtp_norm_{k - 1}", x_BTD)
    return hidden_BTD if config.mtp_input == "normed" else x_BTD, hidden_BTD, written


def normed(config: ModelConfig, weights: DecodeWeights, name: str, x_BTD: Array) -> Array:
    """Returns hidden states normalised for the output head, by the norm of this name."""
    norm = RMSNorm(config.rms_norm_eps, config.norm)
    return cast(Array, norm.apply({"params": weights.params[name]}, x_BTD))
