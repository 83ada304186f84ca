"""Auxiliary-loss-free load balance (arXiv 2408.15664; 2412.19437, section 2.1.2): after each step the bias of an overloaded expert falls, of an underloaded
one rises."""

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig


def moved_bias(bias_E: Array, counts_E: Array, rate: float) -> Array:
    """bias + rate * sign(mean load - load). Counts are of the whole global batch, without padding; leading axes are layers."""
    counts_E = counts_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(counts_E, axis=-1, keepdims=True) - counts_E)


def move_router(config: ModelConfig, router: dict, counts_LE: Array, rate: float) -> dict:
    """The router collection after a step. counts_LE has the main layers first (zeros for dense ones), then one row per MTP module."""
    if not config.moe_layers:
        return router
    main = {"moe": {"bias": moved_bias(router["moe_layers"]["moe"]["bias"], counts_LE[config.dense_layers : config.layers], rate)}}
    mtp = {
        f"mtp_{depth}": {"block": {"moe": {"bias": moved_bias(router[f"mtp_{depth}"]["block"]["moe"]["bias"], counts_LE[config.layers + depth], rate)}}}
        for depth in range(config.mtp_depth)
        if config.layers + depth < counts_LE.shape[0]  # a pass without MTP reports none
    }
    return router | {"moe_layers": main} | mtp


def load(counts_LE: Array) -> Array:
    """Tokens per expert over the layer's mean: 1 everywhere is perfect balance."""
    counts_LE = counts_LE.astype(jnp.float32)
    return counts_LE / jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1)
