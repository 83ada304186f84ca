"""Load balance of the experts without an auxiliary loss: the router's bias update.

ArXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
The router selects experts by score + bias (model/layers/moe.py). After each step `updated_bias`
lowers the bias of an overloaded expert and raises that of an underloaded one.
"""

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.transformer import block_name, stack_name


def updated_bias(bias_E: Array, counts_E: Array, rate: float) -> Array:
    """Moves the router's bias against the load (arXiv 2408.15664, algorithm 1).

        b_i <- b_i + u * sign(mean_j(c_j) - c_i)

    Args:
      bias_E: b, float32. Leading axes are layers, each balanced by itself.
      counts_E: c, the tokens that each expert got, of the whole global batch and without padding.
      rate: u, train.router_bias_rate.
    """
    counts_E = counts_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(counts_E, axis=-1, keepdims=True) - counts_E)


def update_router(config: ModelConfig, router: dict, counts_LE: Array, rate: float) -> dict:
    """Returns the router collection after a step.

    Args:
      counts_LE: tokens per expert of the main layers (zeros for dense ones), then of each MTP
        module that ran. The biases of the others stay.
    """
    if not config.moe.router_bias:
        return router
    updated = {}
    for number, stack in enumerate(config.stacks):
        blocks = {}
        for place, kind in enumerate(stack.kinds):
            if kind.moe:
                same_kind = slice(stack.first + place, stack.first + stack.layers, len(stack.kinds))
                blocks[block_name(place)] = _updated(
                    router[stack_name(number)][block_name(place)], counts_LE[same_kind], rate
                )
        if blocks:
            updated[stack_name(number)] = blocks
    for depth in range(config.num_nextn_predict_layers if config.mtp_kind.moe else 0):
        row = config.num_hidden_layers + depth
        if row < counts_LE.shape[0]:
            block = _updated(router[f"mtp_{depth}"]["block"], counts_LE[row], rate)
            updated[f"mtp_{depth}"] = {"block": block}
    return router | updated


def _updated(block: dict, counts_E: Array, rate: float) -> dict:
    return {"moe": {"bias": updated_bias(block["moe"]["bias"], counts_E, rate)}}


def expert_load(counts_LE: Array) -> Array:
    """Returns tokens per expert over the layer's mean [L, E]: 1 everywhere is perfect balance."""
    counts_LE = counts_LE.astype(jnp.float32)
    return counts_LE / jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1)
