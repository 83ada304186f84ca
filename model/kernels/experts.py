"""The routed experts' FFN: each token through its chosen experts, mixed by their gates. Dropless: no token is ever left out.

| implementation | how | good for |
|---|---|---|
| reference | every expert on every token, unchosen ones weighted 0 | decoding a few tokens (each expert's weights are read once anyway), and the oracle |
| blocks | tokens sorted by expert, each expert's share padded to whole blocks, batched matmul over blocks | CPU and GPU |
| ragged | tokens sorted by expert, `jax.lax.ragged_dot` | TPU, where XLA has a kernel for it (on CPU it is 13 times slower than blocks) |
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from errors import UserError

BLOCK = 128  # tokens; the largest block. Padding wastes half a block per expert on average.


def ffn(x_TD: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (arXiv 2002.05202, eq. 6)."""
    return (jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)) @ down_FD


def experts_reference(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """Every expert on every token."""
    E = gate_EDF.shape[0]
    mix_TE = jnp.sum(jnp.where(chosen_TK[..., None] == jnp.arange(E), gates_TK[..., None], 0.0), axis=1)
    out_ETD = ffn(x_TD, gate_EDF, up_EDF, down_EFD)
    return jnp.einsum("ETD,TE->TD", out_ETD, mix_TE.astype(x_TD.dtype))


@functools.partial(jax.custom_vjp)
def dispatch(x_TD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Row s is token `token_of_slot[s]`; slots without a token (index T) are zero. A slot index of S in `slot_of` says the choice has no slot.

    Its transpose is `collect`, a gather as well: a scatter-add would be slow on CPU and unordered on GPU.
    """
    return jnp.take(x_TD, token_of_slot_S, axis=0, mode="fill", fill_value=0)


def collect(y_SD: Array, slot_of_TK: Array) -> Array:
    """The sum over each token's choices of their slots' rows, in order of choice."""
    return jnp.sum(jnp.take(y_SD, slot_of_TK, axis=0, mode="fill", fill_value=0), axis=1)


dispatch.defvjp(
    lambda x_TD, token_of_slot_S, slot_of_TK: (dispatch(x_TD, token_of_slot_S, slot_of_TK), slot_of_TK),
    lambda slot_of_TK, dy_SD: (collect(dy_SD, slot_of_TK), None, None),
)


@jax.custom_vjp
def combine(y_SD: Array, gates_TK: Array, slot_of_TK: Array, choice_of_slot_S: Array) -> Array:
    """sum_k gates[t, k] * y[slot_of[t, k]]; `choice_of_slot` (index T * K where empty) is its inverse, for the backward gather."""
    return jnp.einsum("TKD,TK->TD", jnp.take(y_SD, slot_of_TK, axis=0, mode="fill", fill_value=0), gates_TK)


def combine_forward(y_SD, gates_TK, slot_of_TK, choice_of_slot_S):
    return combine(y_SD, gates_TK, slot_of_TK, choice_of_slot_S), (y_SD, gates_TK, slot_of_TK, choice_of_slot_S)


def combine_backward(saved, dout_TD):
    y_SD, gates_TK, slot_of_TK, choice_of_slot_S = saved
    K = gates_TK.shape[1]
    gate_S = jnp.take(gates_TK.reshape(-1), choice_of_slot_S, mode="fill", fill_value=0)
    dy_SD = jnp.take(dout_TD, choice_of_slot_S // K, axis=0, mode="fill", fill_value=0)
    # d gate[t, k] = dout[t] . y[slot]: per slot first, so that only one array of S x D is read.
    dgate_S = jnp.sum(dy_SD * y_SD, axis=-1)
    dgates_TK = jnp.take(dgate_S, slot_of_TK, mode="fill", fill_value=0)
    return dy_SD * gate_S[:, None], dgates_TK.astype(gates_TK.dtype), None, None


combine.defvjp(combine_forward, combine_backward)


def sorted_slots(chosen_TK: Array, experts: int, block: int) -> tuple[Array, Array, Array, Array]:
    """Gives every (token, choice) a slot, experts in order, each expert's share beginning on a block boundary.

    Choices outside 0 .. experts - 1 belong to other devices and get no slot.

    Returns:
      slot_of_TK: the slot of each choice, S where it has none.
      choice_of_slot_S: t * K + k, or T * K in an empty slot. S is the most that can be needed, in whole blocks.
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
    slot_M = jnp.where(expert_M < experts, first_block_E[local_M] * block + rank_M - first_E[local_M], S)

    expert_of_block_n = jnp.sum(jnp.arange(n)[:, None] >= (first_block_E + blocks_E)[None], axis=1)
    expert_of_block_n = jnp.minimum(expert_of_block_n, experts - 1)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_S = jnp.repeat(expert_of_block_n, block)
    within_S = slot_S - first_block_E[expert_S] * block
    used_S = within_S < counts_E[expert_S]
    choice_of_slot_S = jnp.where(used_S, order_M[jnp.minimum(first_E[expert_S] + within_S, M - 1)], M)
    return slot_M.reshape(T, K), choice_of_slot_S, expert_of_block_n, counts_E


def block_size(choices: int, experts: int) -> int:
    """As large as an expert's average share, a power of two, at most BLOCK: large blocks pay for reading the weights, small ones waste less padding."""
    share = max(choices // experts, 1)
    return max(8, min(BLOCK, 1 << (share.bit_length() - 1)))


def experts_blocks(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """Batched matmul over blocks of tokens that share an expert."""
    T, K = chosen_TK.shape
    E = gate_EDF.shape[0]
    block = block_size(T * K, E)
    slot_of_TK, choice_of_slot_S, expert_of_block_n, _ = sorted_slots(chosen_TK, E, block)
    x_SD = dispatch(x_TD, choice_of_slot_S // K, slot_of_TK)
    # One-hot matmul in place of a gather: its transpose is a matmul too, where a gather's would be a scatter-add of whole matrices.
    one_hot_nE = (expert_of_block_n[:, None] == jnp.arange(E)).astype(x_TD.dtype)
    gate_nDF, up_nDF, down_nFD = (jnp.einsum("nE,EXY->nXY", one_hot_nE, w) for w in (gate_EDF, up_EDF, down_EFD))
    y_nbD = ffn(x_SD.reshape(-1, block, x_TD.shape[1]), gate_nDF, up_nDF, down_nFD)
    return combine(y_nbD.reshape(-1, x_TD.shape[1]), gates_TK.astype(x_TD.dtype), slot_of_TK, choice_of_slot_S)


def experts_ragged(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """`jax.lax.ragged_dot` over tokens sorted by expert."""
    K = chosen_TK.shape[1]
    slot_of_TK, choice_of_slot_S, _, counts_E = sorted_slots(chosen_TK, gate_EDF.shape[0], block=1)
    x_SD = dispatch(x_TD, choice_of_slot_S // K, slot_of_TK)
    hidden_SF = jax.nn.silu(jax.lax.ragged_dot(x_SD, gate_EDF, counts_E)) * jax.lax.ragged_dot(x_SD, up_EDF, counts_E)
    y_SD = jax.lax.ragged_dot(hidden_SF, down_EFD, counts_E)
    return combine(y_SD, gates_TK.astype(x_TD.dtype), slot_of_TK, choice_of_slot_S)


IMPLEMENTATIONS: dict[str, Callable] = {"reference": experts_reference, "blocks": experts_blocks, "ragged": experts_ragged}


def pick(name: str, platform: str, choices: int, experts: int) -> Callable:
    """The table: (platform, size) -> implementation. `name` other than "auto" overrides it."""
    if name == "auto":
        few = choices <= 16 * experts  # then the weights, not the arithmetic, set the time
        name = "reference" if few else "ragged" if platform == "tpu" else "blocks"
    if name not in IMPLEMENTATIONS:
        raise UserError(f"model.expert_matmul = {name!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]
