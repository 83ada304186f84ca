"""The sigmoid gate on attention's output (arXiv 2505.06708)."""

import flax.linen as nn
import jax
from jax import Array

from model.config import ModelConfig
from model.layers.linear import linear
from model.layers.parameter import parameter


def gate_weight(
    module: nn.Module, config: ModelConfig, kind: str, heads: int, value_width: int
) -> Array | None:
    """Declares the parameter "gate" of an attention module.

    Returns [D, N] for a gate per head, [D, N, V] for a gate per element of a head's V channels,
    None for no gate.
    """
    if kind == "none":
        return None
    init = nn.initializers.normal(config.initializer_range)
    shape, axes = (config.hidden_size, heads, value_width), ("embed", "heads", "head_dim")
    rank = 2 if kind == "head" else 3
    return parameter(module, "gate", init, shape[:rank], axes[:rank])


def gated(out_BTNV: Array, hidden_BTD: Array, gate: Array | None) -> Array:
    """Computes Y * sigmoid(X W), before the output projection (eq. 5, position G1).

    X is the normalised hidden state that the queries come from, Y attention's output of V channels
    a head.
    """
    if gate is None:
        return out_BTNV
    with jax.named_scope("gate"):
        gate_BTNV = linear(hidden_BTD, gate)
        return out_BTNV * jax.nn.sigmoid(gate_BTNV if gate.ndim == 3 else gate_BTNV[..., None])
