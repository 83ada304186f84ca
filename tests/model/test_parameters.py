"""What a parameter says of itself where it is declared: its axes, and what it is used for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from model.decode_weights import decode_weights
from model.layers.table import ATTENTION_TYPES
from model.sharding import RULES, Named, is_named
from model.transformer import boxed_shapes, layer_paths
from tests import tiny

CONFIGS = {"mla": tiny.model_config(), "hybrid": tiny.HYBRID}


def boxes(config) -> dict[str, Named]:
    """The boxes of all variables, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed_shapes(config), is_leaf=is_named)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): box for path, box in leaves}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_axis_has_a_rule(config):
    for path, box in boxes(config).items():
        assert len(box.names) == box.value.ndim, path
        assert all(name is None or name in RULES for name in box.names), path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_per_channel_is_a_matrix(config):
    """It sums over some axes and writes to others; separate matrices are stacked before both."""
    for path, box in boxes(config).items():
        inputs, outputs = box.matrix_axes
        if not box.use.per_channel:
            assert inputs and outputs, path
            stacked = box.value.ndim - len(inputs) - len(outputs)
            assert inputs + outputs == tuple(range(stacked, box.value.ndim)), path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decoding_casts_what_may_be_cast(config):
    """In bfloat16 everything but what is declared with `keep_float32`."""
    config = dataclasses.replace(config, dtype="bfloat16")
    boxed = boxed_shapes(config)
    weights = jax.eval_shape(
        lambda variables: decode_weights(config, variables, rows=64), nn.meta.unbox(boxed)
    )

    def check(box, leaf):
        assert leaf.dtype == (jnp.float32 if box.use.keep_float32 else jnp.bfloat16), box

    outside = {name: boxed["params"][name] for name in weights.params}
    jax.tree.map(check, outside, weights.params, is_leaf=is_named)
    for (stack, block, _), layer in zip(layer_paths(config), weights.layers, strict=True):
        for kind, variables in layer.items():
            if variables:
                jax.tree.map(check, boxed[kind][stack][block], variables, is_leaf=is_named)


def test_every_type_of_attention_has_a_row():
    sections = {name for name, section in vars(CONFIGS["mla"]).items() if hasattr(section, "cost")}
    assert set(ATTENTION_TYPES) == sections
