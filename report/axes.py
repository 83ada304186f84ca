"""Axes of a chart: from values to pixels, and where the ticks are."""

import math
from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """The values `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """Returns where values are drawn."""
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (np.asarray(values, float) - low) / (high - low) * (
            self.end - self.start
        )

    def ticks(self, most: int = 6) -> list[float]:
        """Returns at most about `most` round values on the axis."""
        powers = _decades(self.low, self.high, most) if self.log else []
        return powers if len(powers) > 1 else _round(self.low, self.high, most)


def axis_over(
    values: np.ndarray, start: float, end: float, *, from_zero: bool = False, log: bool = False
) -> Axis:
    """Returns an axis with room for all values, from 0 on if it is to be and none is below.

    It is linear, whatever `log` says, where a value is not positive.
    """
    low, high = float(values.min()), float(values.max())
    if log and low > 0:
        room = max((high / low) ** 0.05, 1.1)
        return Axis(low / room, high * room, start, end, log=True)
    if from_zero and low >= 0:
        return Axis(0.0, high * 1.05 or 1.0, start, end)
    # What is nearly constant is not blown up to the height of the chart.
    room = max((high - low) * 0.05, abs(high) * 1e-3, 1e-12)
    return Axis(low - room, high + room, start, end)


def _round(low: float, high: float, most: int) -> list[float]:
    """Returns the multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """Returns the powers of ten between two values, every n-th; of few decades 2s and 5s too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, -(-(last - first) // most))
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low <= tick <= high]
