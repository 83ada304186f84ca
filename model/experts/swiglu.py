"""The gated activation of the feed-forward networks."""

import functools

import jax
from jax import Array


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate_TF: Array, up_TF: Array) -> Array:
    """silu(gate) * up (arXiv 2002.05202, eq. 6). The backward pass keeps its two inputs and none of
    the steps between.
    """
    return jax.nn.silu(gate_TF) * up_TF
