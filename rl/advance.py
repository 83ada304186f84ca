"""Sampling in every live slot: a token a pass of the model, or several that were drafted.

A pass draws the next token of each row from the logits that it stands at. Without drafts the model
reads it, which gives the next logits. With them the MTP modules first draft D tokens behind it, the
model reads all D + 1 at once, and as many drafts are taken as agree with what it says of them:

    draw x -> draft y_1 .. y_D -> read x y_1 .. y_D -> take the first few of y -> next logits

What is sampled has the distribution that it has without drafts, whatever the drafts are.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kernels.bitmask import pack
from model.config import ModelConfig
from model.decode import keep_first, read, read_trunk
from model.decode_weights import DecodeWeights
from model.drafts import propose
from model.heads import logits_of
from model.record import CHOICES, Choices
from rl.config import SamplingConfig
from rl.draw import Distribution, Drawn, distribution, draw, likeliest
from rl.slots import NOTHING, Rules, Sampled, Slots, by_row, by_token

DRAFT, ACCEPT = 1, 2  # the draws at a place beside the token's own, where drafts are rejected


def advance(
    config: ModelConfig,
    sampling: SamplingConfig,
    most_passes: int,
    record: Collection[str],
    weights: DecodeWeights,
    slots: Slots,
    passes: ArrayLike,
    idle: ArrayLike,
    drafting_B: ArrayLike = True,
    allowed_BV: Array | None = None,
) -> tuple[Slots, Sampled]:
    """Samples in every live slot, and reads each token but a row's last.

    A pass of the model samples a token, and with sampling.drafts up to so many more. A row halts
    with an id of its `stop_BK`, or when it has sampled `left_B` tokens.

    Args:
      most_passes: N, of what is returned.
      record: which of `rl.records.RECORDS` to return.
      passes: how many there are to be, at most N.
      idle: returns before, when at least so many slots are not live.
      drafting_B: bool, which rows take drafts, if there are any.
      allowed_BV: bool, the ids that may be sampled; None allows all.
    """
    rows, W = slots.rules.left_B.shape[0], sampling.drafts + 1
    model = by_token(config, rows * W)

    def one_pass(slots: Slots) -> tuple[Slots, Sampled]:
        drawn = draw(
            sampling,
            slots.logits_BV,
            slots.rules.keys_at(slots.cache.length_B),
            slots.rules.forbidden_BK,
            allowed_BV,
            slots.rejected_BV,
        )
        if not sampling.drafts:
            return read_drawn(model, sampling, record, weights, slots, drawn)
        return speculate(model, sampling, record, weights, slots, drawn, drafting_B)

    def goes_on(state: tuple[Slots, Sampled, Array]) -> Array:
        slots, _, done = state
        live = jnp.sum(slots.rules.left_B > 0)
        return (done < passes) & (live > 0) & (live > rows - idle)

    def body(state: tuple[Slots, Sampled, Array]) -> tuple[Slots, Sampled, Array]:
        slots, sampled, done = state
        slots, new = one_pass(slots)
        sampled = jax.tree.map(lambda x_NBW, x_BW: x_NBW.at[done].set(x_BW), sampled, new)
        return by_row(slots), sampled, done + 1

    like = jax.eval_shape(one_pass, slots)[1]
    nothing = jax.tree.map(lambda x_BW: jnp.zeros((most_passes, *x_BW.shape), x_BW.dtype), like)
    nothing = dataclasses.replace(nothing, tokens=jnp.full_like(nothing.tokens, NOTHING))
    begin = slots, nothing, jnp.zeros((), jnp.int32)
    slots, sampled, _ = jax.lax.while_loop(goes_on, body, begin)
    return slots, sampled


def read_drawn(
    config: ModelConfig,
    sampling: SamplingConfig,
    record: Collection[str],
    weights: DecodeWeights,
    slots: Slots,
    drawn: Drawn,
) -> tuple[Slots, Sampled]:
    """Reads the tokens that were drawn, in rows that go on."""
    left_B, live_B = slots.rules.left_after(drawn.token_B), slots.rules.left_B > 0
    cache, hidden_B1D, _, choices = read(
        config,
        weights,
        drawn.token_B[:, None],
        (left_B > 0).astype(jnp.int32),
        slots.cache,
        sampling.attention,
        choices_in(record),
    )
    new = sampled_of([(drawn, live_B)], choices, record)
    logits_BV = logits_of(config, weights.params, hidden_B1D[:, 0])
    rules = dataclasses.replace(slots.rules, left_B=left_B)
    return Slots(cache, logits_BV, rules, slots.rejected_BV), new


def speculate(
    config: ModelConfig,
    sampling: SamplingConfig,
    record: Collection[str],
    weights: DecodeWeights,
    slots: Slots,
    drawn: Drawn,
    drafting_B: ArrayLike,
) -> tuple[Slots, Sampled]:
    """Drafts D tokens behind those that were drawn, verifies them and reads those it takes.

    Args:
      drafting_B: as of `advance`.
    """
    D, rules, length_B = sampling.drafts, slots.rules, slots.cache.length_B
    drafted: list[Distribution] = []

    def pick(hidden_BD: Array, k: int) -> Array:
        """Draws draft k, with the rules of the row."""
        logits_BV = logits_of(config, weights.params, hidden_BD)
        choice = distribution(sampling, logits_BV, rules.forbidden_BK)
        drafted.append(choice)
        return drawn_from(sampling, rules, choice, logits_BV, length_B + k, DRAFT)

    drafts_BD, modules = propose(
        config, weights, slots.cache, drawn.token_B, sampling.attention, pick
    )
    tokens_BW = jnp.concatenate([drawn.token_B[:, None], drafts_BD], axis=1)
    left_B = rules.left_after(drawn.token_B)
    reading = read_trunk(
        config,
        weights,
        tokens_BW,
        jnp.where(left_B > 0, D + 1, 0),
        slots.cache,
        sampling.attention,
        choices_in(record),
        every=True,
    )
    logits_BWV = logits_of(config, weights.params, reading.hidden_BTD)

    # Row by row: draft k is taken while those before it were and the row may go on.
    emitted, read_B = [(drawn, rules.left_B > 0)], (left_B > 0).astype(jnp.int32)
    rejected_BV, going_B = slots.rejected_BV, (left_B > 0) & jnp.asarray(drafting_B)
    if rejected_BV is not None:
        rejected_BV = jnp.full_like(rejected_BV, -jnp.inf)
    for k in range(1, D + 1):
        logits_BV, token_B = logits_BWV[:, k - 1], tokens_BW[:, k]
        choice = distribution(sampling, logits_BV, rules.forbidden_BK)
        if rejected_BV is None:
            taken_B = token_B == drawn_from(sampling, rules, choice, logits_BV, length_B + k)
        else:
            taken_B = accepts(rules, choice, drafted[k - 1], token_B, length_B + k)
            fails_B1 = (going_B & ~taken_B)[:, None]
            rejected_BV = jnp.where(fails_B1, drafted[k - 1].normalised_BV, rejected_BV)
        going_B &= taken_B
        emitted.append((choice.drawn(token_B), going_B))
        left_B = jnp.where(
            going_B, dataclasses.replace(rules, left_B=left_B).left_after(token_B), left_B
        )
        going_B &= left_B > 0
        read_B += going_B
    new = sampled_of(emitted, reading.choices, record)
    cache = keep_first(slots.cache, modules, reading, tokens_BW, read_B)
    last_B11 = jnp.maximum(read_B - 1, 0)[:, None, None]
    logits_BV = jnp.take_along_axis(logits_BWV, last_B11, axis=1)[:, 0]
    rules = dataclasses.replace(rules, left_B=left_B)
    return Slots(cache, logits_BV, rules, rejected_BV), new


def choices_in(record: Collection[str]) -> frozenset[str]:
    """Returns the records that the layers choose."""
    return frozenset(record) & frozenset(CHOICES)


def sampled_of(
    tokens: Sequence[tuple[Drawn, Array]], choices: Choices | None, record: Collection[str]
) -> Sampled:
    """Returns what one pass sampled, [B, W]: W draws, and where each is a token of its row."""
    records = []
    for drawn, real_B in tokens:
        support_BW = pack(drawn.kept_BV) if "support" in record else None
        token_B = jnp.where(real_B, drawn.token_B, NOTHING)
        records.append(Sampled(token_B, drawn.logprob_B, drawn.log_kept_B, None, support_BW))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *records)
    return dataclasses.replace(stacked, choices=choices)


def drawn_from(
    sampling: SamplingConfig,
    rules: Rules,
    choice: Distribution,
    logits_BV: Array,
    position_B: Array,
    purpose: int = 0,
) -> Array:
    """Draws the token at a place of each row, [B].

    By coupling a draft is drawn with the random numbers of the token that it stands for.

    Args:
      purpose: DRAFT for a draft; 0 for the token itself.
    """
    if sampling.temperature == 0:
        return likeliest(choice, logits_BV).astype(jnp.int32)
    key_B = rules.keys_at(position_B)
    if purpose and sampling.draft_acceptance == "rejection":
        key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, purpose)
    return jax.vmap(jax.random.categorical)(key_B, choice.kept_BV).astype(jnp.int32)


def accepts(
    rules: Rules, choice: Distribution, drafted: Distribution, token_B: Array, position_B: Array
) -> Array:
    """Tells whether each row takes a draft: with probability min(1, p / q). [B] bool.

    It is arXiv 2211.17192, algorithm 1.

    Args:
      choice: p, what the model draws from.
      drafted: q, what the draft was drawn from.
    """
    key_B = jax.vmap(jax.random.fold_in, (0, None))(rules.keys_at(position_B), ACCEPT)
    uniform_B = jax.vmap(jax.random.uniform)(key_B)
    p_B, q_B = (
        jnp.take_along_axis(each.normalised_BV, token_B[:, None], axis=-1)[:, 0]
        for each in (choice, drafted)
    )
    return uniform_B * jnp.exp(q_B) < jnp.exp(p_B)
