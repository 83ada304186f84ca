"""Reading and writing token by token: `prefill` fills a cache, `read` extends it.

Attention over cached latents is absorbed (model/attention/decode.py). Where the MTP modules draft,
their caches are filled on the way (model/drafts.py).
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.decode_weights import DecodeWeights
from model.drafts import follow, normed
from model.heads import embed
from model.record import Choices, choices_of
from model.transformer import Block, Output, Transformer, layer_paths


class Reading(NamedTuple):
    """What reading some tokens of B rows gives.

    cache: with these tokens.
    hidden_BTD: the hidden states, normalised, for the output head.
    further_BTD: what the first MTP module reads of the trunk.
    choices: what the layers chose, None where it is not recorded.
    """

    cache: Cache
    hidden_BTD: Array
    further_BTD: Array
    choices: Choices | None


def prefill(
    config: ModelConfig,
    variables: dict,
    tokens_BT: Array,
    count_B: Array,
    capacity: int,
    stage: str,
    attention_top_p: float = 1.0,
    record: Collection[str] = (),
    drafts: int = 0,
) -> tuple[Cache, Array, Choices | None]:
    """Reads the beginnings of sequences into a new cache, as the trainer's forward pass does.

    Args:
      variables: {"params", "router"}.
      tokens_BT: one sequence a row, padded on the right.
      count_B: how many tokens each row has, from 0 to T.
      capacity: for how many tokens a row has room, at least T.
      stage: "dense" | "sparse"; what is decoded from the cache shall have the same.
      attention_top_p: decoding reads the fewest keys that by estimate have this share of attention
        (Twilight, arXiv 2502.02770).
      record: which of `model.record.CHOICES` to return.
      drafts: how many tokens the MTP modules are to draft at a time.

    Returns: the cache; the hidden states [B, D] of each row's last token, for the output head; and
    the choices, None where none are recorded.
    """
    B, T = tokens_BT.shape
    cache = Cache.empty(config, B, capacity, stage, attention_top_p, drafts)
    tokens = cache.tokens(count_B, T, stage)
    inputs, choices = (tokens_BT, tokens.positions_BT, tokens.segments_BT), None
    applied: Any = Transformer(config).apply(
        variables,
        *inputs,
        stage=stage,
        mtp=drafts > 0,
        # They read the last positions when they draft.
        mtp_until_B=count_B - drafts - 1,
        mutable=["record"] if record else False,
    )
    output = cast(Output, applied[0] if record else applied)
    if record:
        of_layers = [
            jax.tree.map(lambda leaf, i=index: leaf[i], applied[1]["record"][stack][block])
            for stack, block, index in layer_paths(config)
        ]
        choices = choices_of(config, of_layers, tokens_BT, record, capacity)

    def written(layers: tuple[LayerCache, ...], entries: tuple[LayerCache, ...]):
        index_BT = cast(Array, tokens.index_BT)
        return tuple(layer.write(new, index_BT) for layer, new in zip(layers, entries, strict=True))

    drafting = cache.drafts
    if drafting:
        drafting = dataclasses.replace(
            drafting, layers=written(drafting.layers, output.mtp_entries[:drafts])
        ).slid(output.further_BTD, tokens_BT, count_B)
    layers = written(cache.layers, output.entries)
    cache = dataclasses.replace(cache, layers=layers, length_B=count_B, drafts=drafting)
    return cache, last_of(output.hidden_BTD, count_B), choices


def last_of(hidden_BTD: Array, count_B: Array) -> Array:
    """Returns the hidden states [B, D] of each row's last token; of an empty row, any."""
    return jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]


def read(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens_BT: Array,
    count_B: Array,
    cache: Cache,
    stage: str,
    record: Collection[str] = (),
) -> Reading:
    """Reads a few more tokens of every row, each row as many as it has.

    Args:
      tokens_BT: the tokens, padded on the right.
      count_B: how many each row has, from 0, which leaves the row as it is, to T.
      cache: what the rows have read, with room for these tokens.
      stage: "dense" | "sparse".
      record: which of `model.record.CHOICES` to return.
    """
    reading = read_trunk(config, weights, tokens_BT, count_B, cache, stage, record)
    drafting = cache.drafts
    if drafting:
        drafting = follow(config, weights, cache, reading.further_BTD, tokens_BT, count_B, stage)
    longer = dataclasses.replace(reading.cache, length_B=cache.length_B + count_B, drafts=drafting)
    return reading._replace(cache=longer)


def read_trunk(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens_BT: Array,
    count_B: Array,
    cache: Cache,
    stage: str,
    record: Collection[str] = (),
    every: bool = False,
) -> Reading:
    """Does what `read` does, but for the length of the cache and the MTP modules.

    Args:
      every: keeps the state after every token, so that `Cache.after` can take the last ones back.
    """
    tokens = cache.tokens(count_B, tokens_BT.shape[1], stage, every)
    x_BTD = embed(config, weights.params["embedding"], tokens_BT)
    layers, recorded, mutable = [], [], ["record"] if record else False
    for number, (kind, past) in enumerate(zip(config.kinds, cache.layers, strict=True)):
        x_BTD, layer = weights.layer(number, x_BTD, config.moe.num_experts)
        applied: Any = Block(config, kind).apply(layer, x_BTD, tokens, past, mutable=mutable)
        x_BTD, (_, written) = applied[0] if record else applied
        layers.append(written)
        recorded.append(applied[1]["record"] if record else {})
    hidden_BTD = normed(config, weights, "final_norm", x_BTD)
    further_BTD = hidden_BTD if config.mtp_input == "normed" else x_BTD
    choices = None
    if record:
        choices = choices_of(config, recorded, tokens_BT, record, cache.capacity)
    longer = dataclasses.replace(cache, layers=tuple(layers))
    return Reading(longer, hidden_BTD, further_BTD, choices)


def keep_first(
    cache: Cache,
    modules: tuple[LayerCache, ...],
    reading: Reading,
    tokens_BW: Array,
    count_B: Array,
) -> Cache:
    """Returns the cache of rows that keep the first of W tokens, of which D are drafts.

    Args:
      cache: before these tokens.
      modules: what `model.drafts.propose` made of the modules' caches.
      reading: by `read_trunk`, with the state after every token.
      tokens_BW: the tokens.
      count_B: how many of them are kept.
    """
    drafts, W = cache.drafts, tokens_BW.shape[1]
    assert drafts is not None
    layers = tuple(layer.after(count_B, W) for layer in modules)
    drafts = dataclasses.replace(drafts, layers=layers)
    return dataclasses.replace(
        reading.cache.after(count_B, W),
        drafts=drafts.slid(reading.further_BTD, tokens_BW, count_B),
    )
