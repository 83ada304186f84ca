"""The routed experts' FFN: each token through its chosen experts, mixed by their gates. Dropless:
no token is ever left out.

| implementation | how | good for |
|---|---|---|
| reference | every expert on every token, unchosen ones weighted 0 | decoding a few tokens (each expert's weights are read once anyway), and the oracle |
| bucketed | tokens sorted by expert, one expert after another, each in a window that its share fits into (`experts_bucketed.py`) | CPU |
| blocks | tokens sorted by expert, each expert's share padded to whole blocks, batched matmul over blocks | GPU without tokamax |
| megablox, tokamax | tokens sorted by expert, a grouped matmul (`grouped_matmul.py`) | TPU; GPU |
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from errors import UserError
from kernels import grouped_matmul
from kernels.grouped_matmul import GroupedMatmul
from model.experts.bucketed import experts_bucketed
from model.experts.slots import collect, dispatch, gates_of_slots, sorted_slots
from model.experts.swiglu import swiglu

BLOCK = 128  # tokens; the largest block. Padding wastes half a block per expert on average.


def experts_reference(
    x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """Every expert on every token: two matmuls with all experts' hidden widths side by side, and
    one back that sums over experts too.
    """
    E = gate_EDF.shape[0]
    mix_TE = jnp.sum(
        jnp.where(chosen_TK[..., None] == jnp.arange(E), gates_TK[..., None], 0.0), axis=1
    )
    gate_TEF, up_TEF = (jnp.einsum("TD,EDF->TEF", x_TD, w_EDF) for w_EDF in (gate_EDF, up_EDF))
    hidden_TEF = swiglu(gate_TEF, up_TEF) * mix_TE[..., None].astype(x_TD.dtype)
    return jnp.einsum("TEF,EFD->TD", hidden_TEF, down_EFD)


@jax.custom_vjp
def weights_of_blocks(w_EXY: Array, expert_of_block_n: Array) -> Array:
    """Each block's weights. The transpose is one matmul with the blocks' one-hot experts, in place
    of a scatter-add of whole matrices.
    """
    return jnp.take(
        w_EXY, expert_of_block_n, axis=0, mode="clip"
    )  # the default mode reads and writes every weight once more, to check


def weights_of_blocks_backward(saved, d_nXY: Array):
    expert_of_block_n, like_EXY = saved
    one_hot_En = (expert_of_block_n == jnp.arange(like_EXY.shape[0])[:, None]).astype(d_nXY.dtype)
    return (one_hot_En @ d_nXY.reshape(d_nXY.shape[0], -1)).reshape(like_EXY.shape), None


weights_of_blocks.defvjp(
    lambda w_EXY, expert_of_block_n: (
        weights_of_blocks(w_EXY, expert_of_block_n),
        (expert_of_block_n, w_EXY),
    ),
    weights_of_blocks_backward,
)


def block_size(choices: int, experts: int) -> int:
    """As large as an expert's average share, a power of two, at most BLOCK: large blocks pay for
    reading the weights, small ones waste less padding.
    """
    share = max(choices // experts, 1)
    return max(8, min(BLOCK, 1 << (share.bit_length() - 1)))


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate_and_up")
)
def experts_blocks(
    x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """Batched matmul over blocks of tokens that share an expert. For the backward pass only the two
    projections' outputs are kept: every block's weights and tokens are gathered anew, which is
    cheaper than to write and read them.
    """
    T, K = chosen_TK.shape
    E, D, _ = gate_EDF.shape
    block = block_size(T * K, E)
    slot_of_TK, choice_of_slot_S, expert_of_block_n, _ = sorted_slots(chosen_TK, E, block)
    slots = choice_of_slot_S // K, slot_of_TK
    x_nbD = dispatch(x_TD, *slots).reshape(-1, block, D)
    gate_nDF, up_nDF, down_nFD = (
        weights_of_blocks(w, expert_of_block_n) for w in (gate_EDF, up_EDF, down_EFD)
    )
    # The gate goes before the down projection, so that its gradient needs no output of that
    # projection.
    gates_nb1 = (
        gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK)
        .reshape(-1, block, 1)
        .astype(x_TD.dtype)
    )
    gate_nbF, up_nbF = (
        checkpoint_name(x_nbD @ gate_nDF, "gate_and_up"),
        checkpoint_name(x_nbD @ up_nDF, "gate_and_up"),
    )
    hidden_nbF = swiglu(gate_nbF, up_nbF) * gates_nb1
    return collect((hidden_nbF @ down_nFD).reshape(-1, D), *slots)


@functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("gate_and_up"),
    static_argnums=(0, 1),
)
def experts_grouped(
    matmul: GroupedMatmul,
    rows: int,
    x_TD: Array,
    chosen_TK: Array,
    gates_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
) -> Array:
    """`matmul(x_SD, w_EDF, counts_E)` over tokens sorted by expert, each expert's share beginning
    on a multiple of `rows`. For the backward pass only the two projections' outputs are kept, as in
    `experts_blocks`.
    """
    slot_of_TK, choice_of_slot_S, _, counts_E = sorted_slots(chosen_TK, gate_EDF.shape[0], rows)
    slots = choice_of_slot_S // chosen_TK.shape[1], slot_of_TK
    slots_E = -(-counts_E // rows) * rows
    x_SD = dispatch(x_TD, *slots)
    gates_S1 = gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK)[:, None].astype(x_TD.dtype)
    gate_SF, up_SF = (
        checkpoint_name(matmul(x_SD, w_EDF, slots_E), "gate_and_up") for w_EDF in (gate_EDF, up_EDF)
    )
    return collect(matmul(swiglu(gate_SF, up_SF) * gates_S1, down_EFD, slots_E), *slots)


IMPLEMENTATIONS = ("blocks", "bucketed", "megablox", "reference", "tokamax")


def few(choices: int, experts: int) -> bool:
    """Whether reading the weights, not the arithmetic, sets the time: then every expert may as well
    see every token.
    """
    return choices <= 16 * experts


def pick(name: str, platform: str, choices: int, experts: int, devices: int = 1) -> Callable:
    """The table: (platform, size) -> implementation. `name` other than "auto" overrides it.

    `choices` are those of all tokens that are here, made among the experts of `devices` devices,
    each with `experts` of them. Raises UserError for a name that is unknown, or not for this
    platform, or not installed.
    """
    if name == "auto":
        name = (
            "reference"
            if few(choices, experts)
            else grouped_matmul.preferred(platform)
            or ("bucketed" if platform == "cpu" else "blocks")
        )
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"model.expert_matmul = {name!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if name in grouped_matmul.PLATFORMS:
        return functools.partial(
            experts_grouped, *grouped_matmul.pick(name, platform, choices // (devices * experts))
        )
    return {"reference": experts_reference, "blocks": experts_blocks, "bucketed": experts_bucketed}[
        name
    ]
