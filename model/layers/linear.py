"""A linear map of tokens, as one matmul of two matrices."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def linear(x: Array, weight: Array, axes: int = 1, output: DTypeLike | None = None) -> Array:
    """Maps x [..., *I] by a weight [*I, *O] to [..., *O].

    Tokens are made one dimension first. The gradient of a weight sums over tokens, and with batch
    and time as two dimensions XLA:CPU transposes copies of both operands for it: a SwiGLU's forward
    and backward pass take 1.3 to 1.4 times as long (python -m bench.linear).

    Args:
      x: the inputs.
      weight: cast to x's dtype.
      axes: the number of dimensions in I, the last of x and the first of the weight.
      output: the dtype to accumulate and return in; x's when None.
    """
    inner = math.prod(weight.shape[:axes])
    rows, columns = x.shape[: x.ndim - axes], weight.shape[axes:]
    y = jnp.matmul(
        x.reshape(-1, inner),
        weight.astype(x.dtype).reshape(inner, -1),
        preferred_element_type=output,
    )
    return y.reshape(*rows, *columns)
