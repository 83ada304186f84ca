"""The gated activation of the feed-forward networks."""

import functools

import jax
from jax import Array


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate_TF: Array, up_TF: Array) -> Array:
    """Computes silu(gate) * up (arXiv 2002.05202, eq. 6), of any shape.

    The backward pass keeps the two inputs and none of the steps between.
    """
    return jax.nn.silu(gate_TF) * up_TF
