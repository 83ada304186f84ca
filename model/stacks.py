"""Layers are cut into stacks of equal periods, so that each stack is compiled once and scanned."""

import functools
from typing import NamedTuple


class LayerKind(NamedTuple):
    """Describes a layer by the type of its attention, and by whether it has experts."""

    attention: str
    moe: bool


class LayerStack(NamedTuple):
    """A period of a few kinds of layer, repeated: one scan over `repeats`.

    The stack holds the layers `first` to `first + len(kinds) * repeats - 1` of the model.
    """

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        """The number of layers in the stack."""
        return len(self.kinds) * self.repeats


@functools.cache
def layer_stacks(kinds: tuple[LayerKind, ...]) -> tuple[LayerStack, ...]:
    """Cuts the layers of a model into stacks.

    From each start on, the period is taken that repeats over the most layers, and the shorter one
    where two cover as many. DeepSeek-V3 gives two stacks of one kind, Qwen3-Next one stack of four.
    """
    stacks, first = [], 0
    while first < len(kinds):
        longest = LayerStack(first, kinds[first : first + 1], 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            repeats = _repeats(kinds[first:], period)
            if repeats > 1 and period * repeats > longest.layers:
                longest = LayerStack(first, kinds[first : first + period], repeats)
        stacks.append(longest)
        first += longest.layers
    return tuple(stacks)


def _repeats(kinds: tuple[LayerKind, ...], period: int) -> int:
    """Counts how often the first `period` kinds stand one after the other at the beginning."""
    repeats = 1
    while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
        repeats += 1
    return repeats
