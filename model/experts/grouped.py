"""The routed experts' FFN by a grouped matmul (kernels/grouped_matmul.py) over sorted tokens.

This is what a TPU runs, and a GPU with tokamax.
"""

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels.grouped_matmul import GroupedMatmul
from model.experts.slots import collect, dispatch, gates_of_slots, sorted_slots
from model.experts.swiglu import swiglu


@functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("gate_and_up"),
    static_argnums=(0, 1),
)
def experts_grouped(
    matmul: GroupedMatmul,
    block: int,
    x_TD: Array,
    expert_TK: Array,
    gates_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
) -> Array:
    """Computes what `experts_reference` does, over tokens sorted by expert.

    For the backward pass only the two projections' outputs are kept, as in `experts_blocks`.

    Args:
      matmul: (x_SD, w_EDF, counts_E) -> [S, F], row s times its expert's matrix.
      block: each expert's share of the rows begins on a multiple of this number.
      x_TD: tokens.
      expert_TK: ids of each token's experts.
      gates_TK: how much each of them weighs.
      gate_EDF: each expert's gate projection.
      up_EDF: each expert's up projection.
      down_EFD: each expert's down projection.
    """
    slots = sorted_slots(expert_TK, gate_EDF.shape[0], block)
    moves = slots.token_of_slot_S, slots.slot_of_TK
    rows_E = -(-slots.counts_E // block) * block
    x_SD = dispatch(x_TD, *moves)
    gates_S = gates_of_slots(gates_TK, slots.choice_of_slot_S, slots.slot_of_TK)
    gates_S1 = gates_S[:, None].astype(x_TD.dtype)
    gate_SF, up_SF = (
        checkpoint_name(matmul(x_SD, w_EDF, rows_E), "gate_and_up") for w_EDF in (gate_EDF, up_EDF)
    )
    return collect(matmul(swiglu(gate_SF, up_SF) * gates_S1, down_EFD, rows_E), *moves)
