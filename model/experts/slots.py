"""Tokens to their experts' slots and back: slots are rows sorted by expert, one for each (token,
choice).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

# Moving tokens to slots and back is gathers both ways, never a scatter-add: that is slow on CPU and
# adds in no fixed order on GPU. Each of these is the other's transpose; an index out of range (T,
# or S) says "none" and reads as zero.


@jax.custom_vjp
def dispatch(x_TD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Row s is token `token_of_slot[s]`, of an empty slot any."""
    return jnp.take(x_TD, token_of_slot_S, axis=0, mode="clip")


@jax.custom_vjp
def collect(y_SD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """The sum over each token's choices of their slots' rows, in order of choice."""
    rows_TD = [
        jnp.take(y_SD, slot_of_T, axis=0, mode="fill", fill_value=0) for slot_of_T in slot_of_TK.T
    ]  # a gather of [T, K, D] is written and read again
    return functools.reduce(jnp.add, rows_TD)


dispatch.defvjp(
    lambda x_TD, *slots: (dispatch(x_TD, *slots), slots),
    lambda slots, dy_SD: (collect(dy_SD, *slots), None, None),
)
collect.defvjp(
    lambda y_SD, *slots: (collect(y_SD, *slots), slots),
    lambda slots, dx_TD: (dispatch(dx_TD, *slots), None, None),
)


@jax.custom_vjp
def gates_of_slots(gates_TK: Array, choice_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Each slot's gate, 0 where it is empty."""
    return jnp.take(gates_TK.reshape(-1), choice_of_slot_S, mode="fill", fill_value=0)


gates_of_slots.defvjp(
    lambda gates_TK, choice_of_slot_S, slot_of_TK: (
        gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK),
        slot_of_TK,
    ),
    lambda slot_of_TK, d_S: (jnp.take(d_S, slot_of_TK, mode="fill", fill_value=0), None, None),
)


def sorted_slots(chosen_TK: Array, experts: int, block: int) -> tuple[Array, Array, Array, Array]:
    """Gives every (token, choice) a slot, experts in order, each expert's share beginning on a
    block boundary.

    Choices outside 0 .. experts - 1 belong to other devices and get no slot.

    Returns:
      slot_of_TK: the slot of each choice, S where it has none.
      choice_of_slot_S: t * K + k, or T * K in an empty slot. S is the most that can be needed, in
        whole blocks.
      expert_of_block_n: whose weights a block needs.
      counts_E: choices per expert.
    """
    T, K = chosen_TK.shape
    M = T * K
    expert_M = jnp.where((chosen_TK >= 0) & (chosen_TK < experts), chosen_TK, experts).reshape(M)
    counts_E = jnp.sum(expert_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    blocks_E = -(-counts_E // block)
    first_E = jnp.cumsum(counts_E) - counts_E  # in sorted order
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    n = (M + experts * (block - 1)) // block  # every expert may leave its last block all but empty
    S = n * block

    order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
    rank_M = jnp.argsort(order_M).astype(jnp.int32)
    local_M = jnp.minimum(expert_M, experts - 1)
    slot_M = jnp.where(
        expert_M < experts, first_block_E[local_M] * block + rank_M - first_E[local_M], S
    )

    expert_of_block_n = jnp.sum(jnp.arange(n)[:, None] >= (first_block_E + blocks_E)[None], axis=1)
    expert_of_block_n = jnp.minimum(expert_of_block_n, experts - 1)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_S = jnp.repeat(expert_of_block_n, block)
    within_S = slot_S - first_block_E[expert_S] * block
    used_S = within_S < counts_E[expert_S]
    choice_of_slot_S = jnp.where(
        used_S, order_M[jnp.minimum(first_E[expert_S] + within_S, M - 1)], M
    )
    return slot_M.reshape(T, K), choice_of_slot_S, expert_of_block_n, counts_E
