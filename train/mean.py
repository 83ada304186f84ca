"""A quantity that adds up: every loss and metric is a total and the weight it is over."""

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Mean:
    """A total and the weight it is over. Add freely, across microbatches, devices and steps; divide
    once, at the end.

    Both are float32 scalars (or arrays of one shape, for a mean per entry). Because the divisor is
    global, a value cannot depend on how the batch was cut.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """The weighted mean of `values`, summed over all axes in float32.

        Args:
          values: any shape and dtype. What stands where the weight is 0 is never read, be it NaN.
          weights: broadcasts to the shape of `values`; bool counts entries.
        """
        values = jnp.asarray(values, jnp.float32)
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), values.shape)
        return cls(jnp.sum(jnp.where(weights != 0, values * weights, 0)), jnp.sum(weights))

    @classmethod
    def zero(cls) -> "Mean":
        """Where a sum of means starts."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Array:
        """total / weight; 0 where nothing was weighed."""
        return self.total / jnp.where(self.weight == 0, 1, self.weight)
