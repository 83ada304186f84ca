"""The plain form of the routed experts' FFN, which the others are tested against.

It is also the fastest for a few tokens, where reading the experts' weights takes the time: then
every weight is read once, and the arithmetic for unselected experts costs nothing.
"""

import jax.numpy as jnp
from jax import Array

from model.experts.swiglu import swiglu


def experts_reference(
    x_TD: Array, expert_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """Applies every expert to every token; an expert that is not among a token's top k weighs 0.

        out_t = sum_k  gates[t, k] * (silu(x_t W_gate) * (x_t W_up)) W_down   of expert[t, k]

    Two matmuls take all experts' hidden widths side by side, and one back sums over experts too.

    Args:
      x_TD: tokens.
      expert_TK: ids of each token's experts. Ids outside 0 .. E - 1 are other devices' experts and
        add nothing.
      gates_TK: how much each of them weighs.
      gate_EDF: each expert's gate projection; like the next two in x's dtype.
      up_EDF: each expert's up projection.
      down_EFD: each expert's down projection.

    Returns: out_TD in x's dtype.
    """
    E = gate_EDF.shape[0]
    mix_TE = jnp.sum(
        jnp.where(expert_TK[..., None] == jnp.arange(E), gates_TK[..., None], 0.0), axis=1
    )
    gate_TEF, up_TEF = (jnp.einsum("TD,EDF->TEF", x_TD, w_EDF) for w_EDF in (gate_EDF, up_EDF))
    hidden_TEF = swiglu(gate_TEF, up_TEF) * mix_TE[..., None].astype(x_TD.dtype)
    return jnp.einsum("TEF,EFD->TD", hidden_TEF, down_EFD)
