"""Tokens to their experts' slots and back.

A slot is a row for one choice, that is a token with one of its experts; slots are sorted by expert:

    choices (token, expert)   (0, 2) (0, 0)   (1, 2) (1, 1)
    slots of expert 0 | 1 | 2            0 |       1 | 0  1

Tokens move to slots and back by gathers both ways, never by a scatter-add: that is slow on CPU and
adds in no fixed order on GPU. `dispatch` and `collect` are each other's transpose; an index out of
range (T of a token, S of a slot) means "none" and reads as zero.

Letters: S slots; c choices, T * K; n blocks of slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Slots(NamedTuple):
    """Maps the choices of experts to slots, and back; `sorted_slots` makes it."""

    slot_of_TK: Array  # the slot of each choice, S where it has none
    choice_of_slot_S: Array  # t * K + k, or T * K in an empty slot
    expert_of_block_n: Array  # whose weights a block needs
    counts_E: Array  # choices of each expert

    @property
    def token_of_slot_S(self) -> Array:
        """The token of each slot, T in an empty slot."""
        return self.choice_of_slot_S // self.slot_of_TK.shape[1]


def sorted_slots(expert_TK: Array, experts: int, block: int) -> Slots:
    """Gives every choice a slot, experts in order.

    Args:
      expert_TK: ids of each token's experts. Ids outside 0 .. experts - 1 belong to other devices
        and get no slot.
      experts: E.
      block: each expert's share of the slots begins on a multiple of this number.

    Returns: the slots; S is the most that can be needed, in whole blocks.
    """
    T, K = expert_TK.shape
    choices = T * K
    own_TK = (expert_TK >= 0) & (expert_TK < experts)
    expert_c = jnp.where(own_TK, expert_TK, experts).reshape(choices)
    counts_E = jnp.sum(expert_c[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    blocks_E = -(-counts_E // block)
    first_E = jnp.cumsum(counts_E) - counts_E  # of an expert's choices in sorted order
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    # Every expert may leave its last block all but empty.
    blocks = (choices + experts * (block - 1)) // block
    S = blocks * block

    order_c = jnp.argsort(expert_c, stable=True).astype(jnp.int32)
    rank_c = jnp.argsort(order_c).astype(jnp.int32)
    own_c = jnp.minimum(expert_c, experts - 1)
    slot_c = jnp.where(
        expert_c < experts, first_block_E[own_c] * block + rank_c - first_E[own_c], S
    )

    block_n1 = jnp.arange(blocks)[:, None]
    expert_of_block_n = jnp.sum(block_n1 >= (first_block_E + blocks_E)[None], axis=1)
    expert_of_block_n = jnp.minimum(expert_of_block_n, experts - 1)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_S = jnp.repeat(expert_of_block_n, block)
    rank_S = slot_S - first_block_E[expert_S] * block  # within the expert's share
    used_S = rank_S < counts_E[expert_S]
    choice_S = order_c[jnp.minimum(first_E[expert_S] + rank_S, choices - 1)]
    choice_of_slot_S = jnp.where(used_S, choice_S, choices)
    return Slots(slot_c.reshape(T, K), choice_of_slot_S, expert_of_block_n, counts_E)


@jax.custom_vjp
def dispatch(x_TD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Copies each slot's token to it, [S, D]; an empty slot holds any token."""
    return jnp.take(x_TD, token_of_slot_S, axis=0, mode="clip")


@jax.custom_vjp
def collect(y_SD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Sums the slots of each token's choices, in order of choice, to [T, D]."""
    # One gather of [T, K, D] would be written and read again.
    rows_TD = [
        jnp.take(y_SD, slot_of_T, axis=0, mode="fill", fill_value=0) for slot_of_T in slot_of_TK.T
    ]
    return functools.reduce(jnp.add, rows_TD)


dispatch.defvjp(
    lambda x_TD, *moves: (dispatch(x_TD, *moves), moves),
    lambda moves, dy_SD: (collect(dy_SD, *moves), None, None),
)
collect.defvjp(
    lambda y_SD, *moves: (collect(y_SD, *moves), moves),
    lambda moves, dx_TD: (dispatch(dx_TD, *moves), None, None),
)


@jax.custom_vjp
def gates_of_slots(gates_TK: Array, choice_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Copies each slot's gate to it, [S]; 0 in an empty slot."""
    return jnp.take(gates_TK.reshape(-1), choice_of_slot_S, mode="fill", fill_value=0)


gates_of_slots.defvjp(
    lambda gates_TK, choice_of_slot_S, slot_of_TK: (
        gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK),
        slot_of_TK,
    ),
    lambda slot_of_TK, d_S: (jnp.take(d_S, slot_of_TK, mode="fill", fill_value=0), None, None),
)
