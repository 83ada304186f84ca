"""The engine's state on the devices, and the programs that change it.

A slot is a row of one cache, for one sequence at a time. `read_prompts` reads a few prompts,
`place` puts each into the slots of its completions, `advance` samples in every live slot, and
`extend` reads more tokens into some of them. Each has one shape for all lengths there may be, so
each is compiled once (`read_prompts` and `extend` for a few widths), and what a row samples does
not depend on the other rows: a matmul of float32 sums a row in the same order whatever the others
hold, as long as their number stays the same.

On a mesh the slots are divided over the devices that divide a batch. Numbers of slots and of
prompts are then those on a device, and arrays over them have D equal parts, one a device.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.cache import Cache
from model.config import ModelConfig
from model.decode import DecodeWeights, last_of, prefill, read
from model.experts import table
from model.heads import logits_of
from model.sharding import constrain, map_shards, spec
from rl.config import SamplingConfig
from rl.draw import draw

STOPS = 16  # ids that may end a row; -1 stands for none
NOTHING = -1  # in place of a token: nothing was sampled


@flax.struct.dataclass
class Slots:
    """B sequences in the middle of sampling.

    cache: what the model remembers of each.
    logits_BV: float32, of the next token.
    key_B2: uint32, the data of each row's random key. A token is drawn with it and its position.
    left_B: int32, how many tokens the row may still sample; 0 in a slot that is not live.
    stop_BK: int32, the ids that end a row, then -1.
    """

    cache: Cache
    logits_BV: Array
    key_B2: Array
    left_B: Array
    stop_BK: Array


@flax.struct.dataclass
class Sampled:
    """What N steps sampled in B slots; the arrays are [N, B].

    tokens: int32 ids, -1 from where a row was not live.
    logprobs, log_kept: as in `rl.draw.Drawn`.
    """

    tokens: Array
    logprobs: Array
    log_kept: Array


def empty_slots(config: ModelConfig, sampling: SamplingConfig, rows: int, capacity: int) -> Slots:
    """Returns `rows` slots with room for `capacity` tokens each, none of them live."""
    cache = Cache.empty(config, rows, capacity, sampling.attention, sampling.attention_top_p)
    slots = Slots(
        cache,
        jnp.zeros((rows, config.vocab_size), jnp.float32),
        jnp.zeros((rows, 2), jnp.uint32),
        jnp.zeros((rows,), jnp.int32),
        jnp.full((rows, STOPS), -1, jnp.int32),
    )
    return by_row(slots)


def by_token(config: ModelConfig, tokens: int) -> ModelConfig:
    """Returns the model computed so that a token's result depends on no other row, to the bit."""
    E, K = config.moe.num_experts, config.moe.num_experts_per_tok
    name = table.by_token(config.expert_matmul, platform(), tokens * K, E)
    return dataclasses.replace(config, expert_matmul=name)


def read_prompts(
    config: ModelConfig,
    sampling: SamplingConfig,
    capacity: int,
    variables: dict,
    tokens_RT: Array,
    count_R: Array,
) -> tuple[Cache, Array]:
    """Reads R prompts, padded on the right. Returns their cache and the logits [R, V] after each.

    They are read in full, whatever share of attention decoding reads.
    """
    cache, hidden_RD = prefill(
        by_token(config, tokens_RT.size),
        variables,
        constrain(tokens_RT, "batch", "time"),
        constrain(count_R, "batch"),
        capacity,
        sampling.attention,
        sampling.attention_top_p,
    )
    return by_row((cache, logits_of(config, variables["params"], hidden_RD)))


def place(
    slots: Slots,
    prompts: Cache,
    logits_RV: Array,
    prompt_M: Array,
    slot_M: Array,
    key_M2: Array,
    left_M: Array,
    stop_MK: Array,
) -> Slots:
    """Begins M rows, each with a prompt that has been read.

    Args:
      prompts, logits_RV: from `read_prompts`.
      prompt_M: the number of each row's prompt.
      slot_M: the slot it begins in; past the last slot for none.
      key_M2, left_M, stop_MK: as in `Slots`.
    """

    def put(slots, prompts, logits_RV, prompt_M, slot_M, key_M2, left_M, stop_MK) -> Slots:
        """Does so for one device's slots."""
        return Slots(
            slots.cache.put(slot_M, prompts.take(prompt_M)),
            slots.logits_BV.at[slot_M].set(logits_RV[prompt_M], mode="drop"),
            slots.key_B2.at[slot_M].set(key_M2, mode="drop"),
            slots.left_B.at[slot_M].set(left_M, mode="drop"),
            slots.stop_BK.at[slot_M].set(stop_MK, mode="drop"),
        )

    given = slots, prompts, logits_RV, prompt_M, slot_M, key_M2, left_M, stop_MK
    return map_shards(put, (spec("batch"),) * len(given), spec("batch"))(*given)


def extend(
    config: ModelConfig,
    sampling: SamplingConfig,
    weights: DecodeWeights,
    slots: Slots,
    slot_M: Array,
    tokens_MT: Array,
    count_M: Array,
    left_M: Array,
) -> Slots:
    """Reads more tokens into M slots, each its own number.

    Args:
      slot_M: the slots; past the last one for none.
      tokens_MT: the tokens, padded on the right.
      count_M: how many they are, at least 1 in a slot.
      left_M: how many tokens the row may sample after them; 0 if more are to be read.
    """

    def take(cache: Cache, slot_M: Array) -> Cache:
        return cache.take(slot_M)

    def put(slots: Slots, slot_M: Array, rows: Cache, logits_MV: Array, left_M: Array) -> Slots:
        """Puts the longer rows back, on one device."""
        return dataclasses.replace(
            slots,
            cache=slots.cache.put(slot_M, rows),
            logits_BV=slots.logits_BV.at[slot_M].set(logits_MV, mode="drop"),
            left_B=slots.left_B.at[slot_M].set(left_M, mode="drop"),
        )

    row = spec("batch")
    rows = map_shards(take, (row, row), row)(slots.cache, slot_M)
    rows, hidden_MTD = read(
        by_token(config, tokens_MT.size),
        weights,
        constrain(tokens_MT, "batch"),
        count_M,
        rows,
        sampling.attention,
    )
    logits_MV = logits_of(config, weights.params, last_of(hidden_MTD, count_M))
    given = slots, slot_M, rows, logits_MV, left_M
    return map_shards(put, (row,) * len(given), row)(*given)


def advance(
    config: ModelConfig,
    sampling: SamplingConfig,
    most_steps: int,
    weights: DecodeWeights,
    slots: Slots,
    steps: Array,
    idle: Array,
) -> tuple[Slots, Sampled]:
    """Samples at most `steps` tokens in every live slot, and reads each but a row's last.

    A row ends with an id of its `stop_BK`, or when it has sampled `left_B` tokens.

    Args:
      most_steps: N, of what is returned.
      steps: how many there are to be, at most N.
      idle: returns before, when at least so many slots are not live.
    """
    rows = slots.left_B.shape[0]
    nothing = Sampled(
        jnp.full((most_steps, rows), NOTHING, jnp.int32),
        jnp.zeros((most_steps, rows), jnp.float32),
        jnp.zeros((most_steps, rows), jnp.float32),
    )

    def goes_on(state: tuple[Slots, Sampled, Array]) -> Array:
        slots, _, step = state
        live = jnp.sum(slots.left_B > 0)
        return (step < steps) & (live > 0) & (rows - live < idle)

    def body(state: tuple[Slots, Sampled, Array]) -> tuple[Slots, Sampled, Array]:
        slots, sampled, step = state
        live_B = slots.left_B > 0
        key_B = jax.vmap(jax.random.fold_in)(
            jax.random.wrap_key_data(slots.key_B2), slots.cache.length_B
        )
        drawn = draw(sampling, slots.logits_BV, key_B)
        token_B = jnp.where(live_B, drawn.token_B, NOTHING)
        stops_B = jnp.any(token_B[:, None] == slots.stop_BK, axis=-1)
        left_B = jnp.where(live_B & ~stops_B, slots.left_B - 1, 0)
        new = Sampled(
            token_B,
            jnp.where(live_B, drawn.logprob_B, 0.0),
            jnp.where(live_B, drawn.log_kept_B, 0.0),
        )
        sampled = jax.tree.map(lambda x_NB, x_B: x_NB.at[step].set(x_B), sampled, new)
        cache, hidden_B1D = read(
            by_token(config, rows),
            weights,
            jnp.maximum(token_B, 0)[:, None],
            (left_B > 0).astype(jnp.int32),
            slots.cache,
            sampling.attention,
        )
        logits_BV = logits_of(config, weights.params, hidden_B1D[:, 0])
        slots = dataclasses.replace(slots, cache=cache, logits_BV=logits_BV, left_B=left_B)
        return by_row(slots), sampled, step + 1

    begin = slots, nothing, jnp.zeros((), jnp.int32)
    slots, sampled, _ = jax.lax.while_loop(goes_on, body, begin)
    return slots, sampled


def by_row(tree: Any) -> Any:
    """Divides the rows of every array over the devices that divide a batch."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch"), tree)
