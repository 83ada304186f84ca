"""The sigmoid gate on attention's output (arXiv 2505.06708)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.layers.linear import linear
from model.sharding import named


def gate_weight(
    module: nn.Module, config: ModelConfig, kind: str, heads: int, value_width: int
) -> Array | None:
    """The parameter "gate" of an attention module: [D, N] for a gate a head, [D, N, V] for one an
    element, None for none.
    """
    if kind == "none":
        return None
    init = nn.initializers.normal(config.initializer_range)
    if kind == "head":
        return module.param(
            "gate", named(init, ("width", "heads")), (config.hidden_size, heads), jnp.float32
        )
    return module.param(
        "gate",
        named(init, ("width", "heads", "head_width")),
        (config.hidden_size, heads, value_width),
        jnp.float32,
    )


def gated(out_BTNV: Array, hidden_BTD: Array, gate: Array | None) -> Array:
    """Y * sigmoid(X W) before the output projection (eq. 5, position G1); X is the normalised
    hidden state the queries come from.
    """
    if gate is None:
        return out_BTNV
    with jax.named_scope("gate"):
        gate_BTNV = linear(hidden_BTD, gate)
        return out_BTNV * jax.nn.sigmoid(gate_BTNV if gate.ndim == 3 else gate_BTNV[..., None])
