"""Counts what a compiled program moves: the bytes of its collectives and its traffic to HBM.

Its source shows neither the collectives, which the partitioner puts in, nor the schedule.
"""

import collections
from collections.abc import Iterator
from typing import NamedTuple

from plan.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    collective_kind,
    executions,
    group_size,
    parse,
)

# These name bytes and move none, or are counted elsewhere: a loop by its body, the end of an
# asynchronous operation by its start.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "while",
    "call",
    "call-start",
    "conditional",
}
SLICES = ("dynamic-slice", "slice", "gather")
UPDATE = "dynamic-update-slice"


class Traffic(NamedTuple):
    """Counts the bytes that one device moves in one execution of the program."""

    collectives: dict[str, tuple[int, float]]  # kind -> (how many, bytes received)
    hbm_bytes: float  # read and written
    unknown_loops: int  # loops whose length the text does not tell: counted as one iteration


def traffic(text: str) -> Traffic:
    """Counts the collectives and the HBM traffic of a scheduled HLO module, given as its text."""
    computations, entry = parse(text)
    counts: collections.Counter[str] = collections.Counter()
    received: dict[str, float] = collections.defaultdict(float)
    hbm = 0.0
    unknown_loops: set[str] = set()
    for name, instruction, times, fused in executions(computations, entry, unknown_loops):
        if kind := collective_kind(instruction, name):
            counts[kind] += times
            received[kind] += times * received_bytes(instruction, kind)
        if not fused:
            hbm += times * hbm_bytes(instruction, computations[name], computations)
    return Traffic(
        {kind: (counts[kind], received[kind]) for kind in COLLECTIVES if counts[kind]},
        hbm,
        len(unknown_loops),
    )


def received_bytes(instruction: Instruction, kind: str) -> float:
    """Returns the bytes that one device receives by the ring algorithms, the least possible."""
    devices = group_size(instruction.attributes)
    sizes = [shape.bytes for shape in instruction.shapes]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        sizes = [max(sizes)]  # its result is (operands, results, ...)
    whole = sum(sizes)
    if instruction.opcode.startswith("reduce-scatter"):
        whole *= devices  # its result is one shard
    share = {"collective-permute": 1.0, "all-reduce": 2 * (devices - 1) / devices}
    return whole * share.get(kind, (devices - 1) / devices)


def hbm_bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Returns the bytes that one instruction of the schedule reads from HBM and writes to it.

    An array that is only sliced counts as its slice, one that is updated in place as the update.
    """
    opcode = instruction.opcode
    if (
        opcode in FREE
        or opcode.endswith(("-done", "-update"))
        or 'custom_call_target="AllocateBuffer"' in instruction.attributes
    ):
        return 0
    if opcode.endswith("-start"):  # its result is (source, destination, ...) or the other way round
        return instruction.bytes
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in SLICES:
        return 2 * instruction.bytes
    if opcode == UPDATE:
        return 2 * operands[1].bytes
    if opcode != "fusion":
        return instruction.bytes + sum(operand.bytes for operand in operands)
    (called,) = instruction.called("calls")
    return _fusion_bytes(instruction, operands, computations[called])


def _fusion_bytes(fusion: Instruction, operands: list[Instruction], body: Computation) -> int:
    """Returns the HBM bytes of a fusion, whose operand k is the parameter(k) of its body."""
    uses = _uses(body)
    read, written = 0, fusion.bytes
    for name, parameter in body.items():
        number = parameter.parameter_number
        if number is None or number >= len(operands) or not operands[number].bytes:
            continue
        operand, used = operands[number], list(_uses_through_bitcasts(name, uses))
        in_place = (*SLICES, UPDATE)
        if used and all(position == 0 and use.opcode in in_place for use, position in used):
            slices = [use for use, _ in used if use.opcode in SLICES]
            read += min(sum(_all_bytes(use) for use in slices), operand.bytes)
            for use, _ in used:
                if use.opcode == UPDATE:
                    written -= max(operand.bytes - _all_bytes(body[use.operands[1]]), 0)
        else:
            read += operand.bytes
    return read + max(written, 0)


Uses = dict[str, list[tuple[Instruction, int]]]  # name -> (who reads it, as which operand)


def _uses(body: Computation) -> Uses:
    uses: Uses = collections.defaultdict(list)
    for instruction in body.values():
        for position, name in enumerate(instruction.operands):
            uses[name].append((instruction, position))
    return uses


def _uses_through_bitcasts(name: str, uses: Uses) -> Iterator[tuple[Instruction, int]]:
    for instruction, position in uses.get(name, ()):
        if instruction.opcode == "bitcast":
            yield from _uses_through_bitcasts(instruction.name, uses)
        else:
            yield instruction, position


def _all_bytes(instruction: Instruction) -> int:
    """Returns the bytes of a result wherever it lies: inside a fusion nothing is placed yet."""
    return sum(shape.bytes for shape in instruction.shapes)
