"""The routed experts' FFN as a batched matmul over blocks of tokens that share an expert.

Tokens are sorted by expert, and each expert's share is padded to whole blocks. This is what a GPU
without tokamax runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from model.experts.slots import collect, dispatch, gates_of_slots, sorted_slots
from model.experts.swiglu import swiglu

MIN_BLOCK = 8
MAX_BLOCK = 128  # tokens. Padding wastes half a block for each expert on average.


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate_and_up")
)
def experts_blocks(
    x_TD: Array, expert_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """Computes what `experts_reference` does, block by block.

    For the backward pass only the two projections' outputs are kept: every block's weights and
    tokens are gathered anew, which is cheaper than to write and read them.
    """
    T, K = expert_TK.shape
    E, D, _ = gate_EDF.shape
    block = block_size(T * K, E)
    slots = sorted_slots(expert_TK, E, block)
    moves = slots.token_of_slot_S, slots.slot_of_TK
    x_nbD = dispatch(x_TD, *moves).reshape(-1, block, D)
    gate_nDF, up_nDF, down_nFD = (
        weights_of_blocks(w, slots.expert_of_block_n) for w in (gate_EDF, up_EDF, down_EFD)
    )
    # The gate goes before the down projection, so that its gradient needs no output of that
    # projection.
    gates_S = gates_of_slots(gates_TK, slots.choice_of_slot_S, slots.slot_of_TK)
    gates_nb1 = gates_S.reshape(-1, block, 1).astype(x_TD.dtype)
    gate_nbF = checkpoint_name(x_nbD @ gate_nDF, "gate_and_up")
    up_nbF = checkpoint_name(x_nbD @ up_nDF, "gate_and_up")
    hidden_nbF = swiglu(gate_nbF, up_nbF) * gates_nb1
    return collect((hidden_nbF @ down_nFD).reshape(-1, D), *moves)


def block_size(choices: int, experts: int) -> int:
    """Returns the tokens of a block: an expert's average share, to a power of two.

    Large blocks pay for reading the weights, small ones waste less padding.
    """
    share = max(choices // experts, 1)
    return max(MIN_BLOCK, min(MAX_BLOCK, 1 << (share.bit_length() - 1)))


@jax.custom_vjp
def weights_of_blocks(w_EXY: Array, expert_of_block_n: Array) -> Array:
    """Gathers each block's weights, [n, X, Y].

    The transpose is one matmul with the blocks' one-hot experts, in place of a scatter-add of whole
    matrices.
    """
    # The default mode reads and writes every weight once more, to check the bounds.
    return jnp.take(w_EXY, expert_of_block_n, axis=0, mode="clip")


def _weights_of_blocks_forward(w_EXY: Array, expert_of_block_n: Array):
    return weights_of_blocks(w_EXY, expert_of_block_n), (expert_of_block_n, w_EXY)


def _weights_of_blocks_backward(saved: tuple[Array, Array], d_nXY: Array):
    expert_of_block_n, w_EXY = saved
    one_hot_En = (expert_of_block_n == jnp.arange(w_EXY.shape[0])[:, None]).astype(d_nXY.dtype)
    return (one_hot_En @ d_nXY.reshape(d_nXY.shape[0], -1)).reshape(w_EXY.shape), None


weights_of_blocks.defvjp(_weights_of_blocks_forward, _weights_of_blocks_backward)
