"""Auxiliary-loss-free load balance (arXiv 2408.15664; 2412.19437, section 2.1.2): after each step
the bias of an overloaded expert falls, of an underloaded one rises.
"""

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.transformer import block_name, stack_name


def moved_bias(bias_E: Array, counts_E: Array, rate: float) -> Array:
    """bias + rate * sign(mean load - load). Counts are of the whole global batch, without padding;
    leading axes are layers.
    """
    counts_E = counts_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(counts_E, axis=-1, keepdims=True) - counts_E)


def move_router(config: ModelConfig, router: dict, counts_LE: Array, rate: float) -> dict:
    """The router collection after a step. counts_LE has the main layers first (zeros for dense
    ones), then one row per MTP module that ran.
    """
    if not config.moe.router_bias:
        return router
    moved = {}
    for number, run in enumerate(config.stacks):
        blocks = {}
        for place, kind in enumerate(run.kinds):
            if kind.moe:
                counts_RE = counts_LE[run.first + place : run.first + run.layers : len(run.kinds)]
                blocks[block_name(place)] = _moved(
                    router[stack_name(number)][block_name(place)], counts_RE, rate
                )
        if blocks:
            moved[stack_name(number)] = blocks
    for depth in range(config.num_nextn_predict_layers if config.mtp_kind.moe else 0):
        if config.num_hidden_layers + depth < counts_LE.shape[0]:
            moved[f"mtp_{depth}"] = {
                "block": _moved(
                    router[f"mtp_{depth}"]["block"],
                    counts_LE[config.num_hidden_layers + depth],
                    rate,
                )
            }
    return router | moved


def _moved(block: dict, counts_E: Array, rate: float) -> dict:
    return {"moe": {"bias": moved_bias(block["moe"]["bias"], counts_E, rate)}}


def expert_load(counts_LE: Array) -> Array:
    """Tokens per expert over the layer's mean: 1 everywhere is perfect balance."""
    counts_LE = counts_LE.astype(jnp.float32)
    return counts_LE / jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1)
