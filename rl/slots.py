"""The engine's state on the devices, and the programs that change it.

A slot is a row of one cache, for one sequence at a time. `read_prompts` reads a few prompts,
`place` puts each into the slots of its completions, `advance` (rl/advance.py) samples in every live
slot, and `extend` reads more tokens into some of them. Each has one shape for all lengths there may
be, so each is compiled once (`read_prompts` and `extend` for a few widths), and what a row samples
does not depend on the other rows: a matmul of float32 sums a row in the same order whatever the
others hold, as long as their number stays the same.

On a mesh the slots are divided over the devices that divide a batch. Numbers of slots and of
prompts are then those on a device, and arrays over them have D equal parts, one a device.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.cache import Cache
from model.config import ModelConfig
from model.decode import last_of, prefill, read
from model.decode_weights import DecodeWeights
from model.experts import table
from model.heads import logits_of
from model.record import Choices
from model.sharding import constrain, map_shards, spec
from rl.config import SamplingConfig

IDS = 16  # ids that may end a row, and ids that it may never sample
NOTHING = -1  # in place of a token: nothing was sampled


@flax.struct.dataclass
class Rules:
    """How B rows go on.

    key_B2: uint32, the data of each row's random key. A token is drawn with it and its position.
    left_B: int32, how many tokens the row may still sample; 0 in a slot that is not live.
    stop_BK: int32, the ids with which a row halts, then -1; K is `IDS`.
    forbidden_BK: int32, distinct ids that are never sampled, then -1.
    """

    key_B2: Array
    left_B: Array
    stop_BK: Array
    forbidden_BK: Array

    def keys_at(self, position_B: Array) -> Array:
        """Returns the random keys that the tokens at these positions are drawn with."""
        return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(self.key_B2), position_B)

    def left_after(self, token_B: Array) -> Array:
        """Returns `left_B` after one more token, in rows that are live."""
        stops_B = jnp.any(token_B[:, None] == self.stop_BK, axis=-1)
        return jnp.where((self.left_B > 0) & ~stops_B, self.left_B - 1, 0)


@flax.struct.dataclass
class Slots:
    """B sequences in the middle of sampling.

    cache: what the model remembers of each.
    logits_BV: float32, of the next token.
    rules: how they go on.
    rejected_BV: float32, what the draft of the next token was drawn from where it was rejected, see
      `rl.draw.without_rejected`; None where drafts are not taken by rejection.
    """

    cache: Cache
    logits_BV: Array
    rules: Rules
    rejected_BV: Array | None = None


@flax.struct.dataclass
class Sampled:
    """What N passes sampled in B slots; the arrays are [N, B, W], W tokens a pass at most.

    tokens: int32 ids; -1 where a pass has fewer, and where a row was not live.
    logprobs, log_kept: as in `rl.draw.Drawn`.
    choices: what the layers chose when they read these tokens, or None.
    support: the ids that each token was drawn from, bitmasks (kernels/bitmask.py), or None.
    """

    tokens: Array
    logprobs: Array
    log_kept: Array
    choices: Choices | None = None
    support: Array | None = None


def empty_slots(config: ModelConfig, sampling: SamplingConfig, rows: int, capacity: int) -> Slots:
    """Returns `rows` slots with room for `capacity` tokens each, none of them live."""
    cache = Cache.empty(
        config, rows, capacity, sampling.attention, sampling.attention_top_p, sampling.drafts
    )
    none_BK = jnp.full((rows, IDS), NOTHING, jnp.int32)
    rules = Rules(jnp.zeros((rows, 2), jnp.uint32), jnp.zeros((rows,), jnp.int32), none_BK, none_BK)
    zeros_BV = jnp.zeros((rows, config.vocab_size), jnp.float32)
    return by_row(Slots(cache, zeros_BV, rules, none_rejected(sampling, zeros_BV)))


def none_rejected(sampling: SamplingConfig, logits_BV: Array) -> Array | None:
    """Returns `Slots.rejected_BV` of rows whose next token was not drafted."""
    by_rejection = sampling.drafts and sampling.draft_acceptance == "rejection"
    return jnp.full_like(logits_BV, -jnp.inf) if by_rejection and sampling.temperature else None


def by_token(config: ModelConfig, tokens: int) -> ModelConfig:
    """Returns the model computed so that a token's result depends on no other row, to the bit."""
    E, K = config.moe.num_experts, config.moe.num_experts_per_tok
    name = table.by_token(config.expert_matmul, platform(), tokens * K, E)
    return dataclasses.replace(config, expert_matmul=name)


def read_prompts(
    config: ModelConfig,
    sampling: SamplingConfig,
    capacity: int,
    record: Collection[str],
    variables: dict,
    tokens_RT: Array,
    count_R: Array,
) -> tuple[Cache, Array, Choices | None]:
    """Reads R prompts, padded on the right.

    They are read in full, whatever share of attention decoding reads.

    Args:
      record: which of `model.record.CHOICES` to return.

    Returns: their cache, the logits [R, V] after each, and what the layers chose.
    """
    cache, hidden_RD, choices = prefill(
        by_token(config, tokens_RT.size),
        variables,
        constrain(tokens_RT, "batch", "time"),
        constrain(count_R, "batch"),
        capacity,
        sampling.attention,
        sampling.attention_top_p,
        record,
        sampling.drafts,
    )
    return by_row((cache, logits_of(config, variables["params"], hidden_RD), choices))


def place(
    slots: Slots,
    prompts: Cache,
    logits_RV: Array,
    prompt_M: Array,
    slot_M: Array,
    rules: Rules,
) -> Slots:
    """Begins M rows, each with a prompt that has been read.

    Args:
      prompts, logits_RV: from `read_prompts`.
      prompt_M: the number of each row's prompt.
      slot_M: the slot it begins in; past the last slot for none.
      rules: of the M rows.
    """

    def put(
        slots: Slots, prompts: Cache, logits_RV: Array, prompt_M: Array, slot_M: Array, rules: Rules
    ) -> Slots:
        """Does so for one device's slots."""
        return put_rows(slots, slot_M, prompts.take(prompt_M), logits_RV[prompt_M], rules)

    given = slots, prompts, logits_RV, prompt_M, slot_M, rules
    return map_shards(put, (spec("batch"),) * len(given), spec("batch"))(*given)


def put_rows(slots: Slots, slot_M: Array, rows: Cache, logits_MV: Array, rules: Rules) -> Slots:
    """Returns one device's slots with other rows in some of them; past the last slot in none."""
    rejected_MV = None
    if slots.rejected_BV is not None:
        rejected_MV = jnp.full_like(logits_MV, -jnp.inf)
    return jax.tree.map(
        lambda leaf, new: leaf.at[slot_M].set(new, mode="drop"),
        slots,
        Slots(rows, logits_MV, rules, rejected_MV),
    )


def extend(
    config: ModelConfig,
    sampling: SamplingConfig,
    record: Collection[str],
    weights: DecodeWeights,
    slots: Slots,
    slot_M: Array,
    length_M: Array,
    tokens_MT: Array,
    count_M: Array,
    rules: Rules,
) -> tuple[Slots, Choices | None]:
    """Reads more tokens into M slots, each its own number. Returns what the layers chose too.

    Args:
      record: which of `model.record.CHOICES` to return.
      slot_M: the slots; past the last one for none.
      length_M: how many tokens of each are kept before: all it has read, or fewer, see `Cache.cut`.
      tokens_MT: the tokens, padded on the right.
      count_M: how many they are; 0 changes nothing but the rules.
      rules: of the M rows after them; `left_B` is 0 where more are to be read.
    """

    def take(cache: Cache, slot_M: Array, length_M: Array) -> Cache:
        return cache.take(slot_M).cut(length_M)

    row = spec("batch")
    rows = map_shards(take, (row, row, row), row)(slots.cache, slot_M, length_M)
    rows, hidden_MTD, _, choices = read(
        by_token(config, tokens_MT.size),
        weights,
        constrain(tokens_MT, "batch"),
        count_M,
        rows,
        sampling.attention,
        record,
    )
    logits_MV = logits_of(config, weights.params, last_of(hidden_MTD, count_M))

    def put(
        slots: Slots, slot_M: Array, rows: Cache, logits_MV: Array, count_M: Array, rules: Rules
    ) -> Slots:
        """Puts the rows back, on one device."""
        before_MV = jnp.take(slots.logits_BV, slot_M, axis=0, mode="clip")
        logits_MV = jnp.where(count_M[:, None] > 0, logits_MV, before_MV)
        return put_rows(slots, slot_M, rows, logits_MV, rules)

    given = slots, slot_M, rows, logits_MV, count_M, rules
    return map_shards(put, (row,) * len(given), row)(*given), choices


def halt(slots: Slots, live_B: Array) -> Slots:
    """Returns the slots with those that shall not be live halted."""
    left_B = jnp.where(live_B, slots.rules.left_B, 0)
    return dataclasses.replace(slots, rules=dataclasses.replace(slots.rules, left_B=left_B))


def by_row(tree: Any) -> Any:
    """Divides the rows of every array over the devices that divide a batch."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch"), tree)
