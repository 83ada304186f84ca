"""A linear map of tokens, as one matmul of two matrices."""

import math

import jax.numpy as jnp
from jax import Array


def linear(x: Array, weight: Array, axes: int = 1, output: jnp.dtype | None = None) -> Array:
    """x [..., *I] and weight [*I, *O] to [..., *O]: the last `axes` dimensions of x against the
    first of the weight, which is cast to x's dtype.

    Tokens are made one dimension first. The gradient of a weight sums over tokens, and with batch
    and time as two dimensions XLA:CPU transposes copies of
    both operands for it: a SwiGLU's forward and backward pass take 1.3 to 1.4 times as long (python
    -m bench.linear).

    Args:
      output: accumulate and return in this dtype; x's when None.
    """
    inner = math.prod(weight.shape[:axes])
    rows, columns = x.shape[: x.ndim - axes], weight.shape[axes:]
    y = jnp.matmul(
        x.reshape(-1, inner),
        weight.astype(x.dtype).reshape(inner, -1),
        preferred_element_type=output,
    )
    return y.reshape(*rows, *columns)
