"""One rule for every loss and metric: a total, the weight it is over, one division at the end."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Mean:
    """A total and the weight it is over.

    Means add across microbatches, devices and batches, and divide once, when `value` is read.
    Because the divisor is global, a value cannot depend on how the data is cut.

    Both fields are float32 arrays of one shape on the device, or plain numbers on the host
    (`jax.tree.map(float, mean)`).
    """

    total: Any
    weight: Any

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def __rmul__(self, factor: float) -> "Mean":
        """Scales the total, and so the value."""
        return Mean(factor * self.total, self.weight)

    @property
    def value(self) -> Any:
        """Returns total / weight. A mean over nothing (weight 0) is total / 1, that is 0."""
        return self.total / (self.weight + (self.weight == 0))
