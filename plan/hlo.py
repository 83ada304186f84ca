"""What a compiled program does that its source does not show: the collectives the partitioner put
in, and the traffic to memory of its schedule.

Read from the scheduled HLO text of one device (`compiled.as_text()`). XLA's own `cost_analysis()`
counts the body of a loop once; here it counts as often as it runs.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# They name bytes and move none, or are counted elsewhere: a loop by its body, the end of an
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


class Shape(NamedTuple):
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]  # of its result; several for a tuple
    op: str
    operands: tuple[str, ...]
    attributes: str  # from the opening parenthesis on: operands, then attributes

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)

    def called(self, *names: str) -> list[str]:
        """The computations it names as any of these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


Computation = dict[str, Instruction]


class Traffic(NamedTuple):
    """Of one device, in one run of the program."""

    collectives: dict[str, tuple[int, float]]  # kind -> (how many, bytes received)
    hbm_bytes: float  # read and written
    unknown_loops: int  # loops whose length the text does not tell: counted as one round


def traffic(text: str) -> Traffic:
    computations, entry = parse(text)
    counts, moved = collections.Counter(), collections.Counter()
    hbm, unknown = 0.0, set()
    for where, instruction, times, fused in scheduled(computations, entry, unknown):
        kind = collective_kind(instruction, where)
        if kind:
            counts[kind] += times
            moved[kind] += times * received(instruction, kind)
        if not fused:
            hbm += times * hbm_bytes(instruction, computations[where], computations)
    return Traffic(
        {kind: (counts[kind], moved[kind]) for kind in COLLECTIVES if counts[kind]},
        hbm,
        len(unknown),
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one where the program begins."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            rest = line[found.end() :]
            result = rest[: _closing(rest)] if rest.startswith("(") else rest[: rest.index(" ")]
            op, _, rest = rest[len(result) :].strip().partition("(")
            end = _closing("(" + rest) - 1
            current[found[1]] = Instruction(
                found[1],
                tuple(_shapes(result)),
                op,
                tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
                rest,
            )
    return computations, entry


def _closing(text: str) -> int:
    """Just past the parenthesis that closes the one `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _shapes(result: str) -> Iterator[Shape]:
    for kind, dimensions, layout in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", result):
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])
        # S(n) is a place other than HBM: a TPU's vector memory, its semaphores.
        yield Shape(
            math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8, "S(" not in layout
        )


def scheduled(
    computations: dict[str, Computation],
    name: str,
    unknown: set[str],
    times: int = 1,
    fused: bool = False,
) -> Iterator[tuple[str, Instruction, int, bool]]:
    """Every instruction that runs, as (its computation, itself, how often, whether inside a
    fusion). Loops of unknown length are added to `unknown`.
    """
    for instruction in computations[name].values():
        yield name, instruction, times, fused
        inner, rounds = (
            instruction.called(
                "calls", "to_apply", "branch_computations", "true_computation", "false_computation"
            ),
            1,
        )
        if instruction.op == "while":
            inner, rounds = instruction.called("body"), trip_count(instruction, computations)
            if rounds is None:
                unknown.add(instruction.name)
                rounds = 1
        elif instruction.op == "fusion":
            inner = [
                called
                for called in inner
                if any(collective_kind(i, called) for i in computations[called].values())
            ]
        elif instruction.op not in ("call", "call-start", "async-start", "conditional"):
            continue  # to_apply of a reduction or a collective is one scalar operation
        for called in inner:
            yield from scheduled(
                computations, called, unknown, times * rounds, fused or instruction.op == "fusion"
            )


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Rounds of a loop, at most: as the compiler says, or from `i < N` in its condition (JAX's
    loops count up from 0 by 1). None if neither tells.
    """
    told = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if told:
        return int(told[1])
    (condition,) = loop.called("condition")
    bounds = set()
    for fusion in (None, *(i for i in computations[condition].values() if i.op == "fusion")):
        body = computations[condition if fusion is None else fusion.called("calls")[0]]
        for compare in (
            i for i in body.values() if i.op == "compare" and "direction=LT" in i.attributes
        ):
            bound = body[compare.operands[1]]
            if bound.op == "parameter" and fusion is not None:
                bound = computations[condition][
                    fusion.operands[int(bound.attributes.partition(")")[0])]
                ]
            if bound.op == "constant":
                bounds.add(int(bound.attributes.partition(")")[0]))
    return bounds.pop() if len(bounds) == 1 else None


def collective_kind(instruction: Instruction, computation: str) -> str | None:
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # A TPU's reduce-scatter is a fusion of an all-reduce and the slice that each device keeps.
    return (
        "reduce-scatter"
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter")
        else kind
    )


def received(instruction: Instruction, kind: str) -> float:
    """Bytes that one device receives, by the ring algorithms: the least that can be moved."""
    n = group_size(instruction.attributes)
    sizes = [shape.bytes for shape in instruction.shapes]
    if (
        instruction.op.endswith("-start") and kind != "all-reduce"
    ):  # whose result is (operands, results, ...)
        sizes = [max(sizes)]
    whole = sum(sizes)
    if instruction.op.startswith("reduce-scatter"):
        whole *= n  # its result is one part
    share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}
    return whole * share.get(kind, (n - 1) / n)


def group_size(attributes: str) -> int:
    """Devices of one replica group, in any of the three ways XLA writes them: {{0,1},{2,3}},
    [groups,size]<=[...], mesh['a'=2,'b'=4] {'b'}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(
            int(part) if part else sizes[name]
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        )
    return 1


def hbm_bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes read from and written to HBM by one instruction of the schedule. Of what is only sliced
    the slice counts, of what is updated the update.
    """
    op = instruction.op
    if (
        op in FREE
        or op.endswith(("-done", "-update"))
        or 'custom_call_target="AllocateBuffer"' in instruction.attributes
    ):
        return 0
    if op.endswith("-start"):  # its result is (source, destination, ...) or the other way round
        return instruction.bytes
    operands = [computation[name] for name in instruction.operands if name in computation]
    if op in SLICES:
        return 2 * instruction.bytes
    if op == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if op != "fusion":
        return instruction.bytes + sum(operand.bytes for operand in operands)
    (called,) = instruction.called("calls")
    return _fused_bytes(instruction, operands, computations[called])


def _fused_bytes(fusion: Instruction, operands: list[Instruction], body: Computation) -> int:
    """Of a fusion: its result and its operands, whose k-th is the body's parameter(k)."""
    users = collections.defaultdict(list)
    for inner in body.values():
        for position, name in enumerate(inner.operands):
            users[name].append((inner, position))

    def used(name: str) -> list[tuple[Instruction, int]]:
        """What reads it, seen through bitcasts."""
        return [
            use
            for inner, position in users[name]
            for use in (used(inner.name) if inner.op == "bitcast" else [(inner, position)])
        ]

    total, written = 0, fusion.bytes
    for name, inner in body.items():
        index = re.match(r"(\d+)\)", inner.attributes) if inner.op == "parameter" else None
        if index is None or int(index[1]) >= len(operands):
            continue
        operand, uses = operands[int(index[1])], used(name)
        if not operand.bytes:
            continue
        updates = [
            use for use, position in uses if use.op == "dynamic-update-slice" and position == 0
        ]
        if uses and all(
            position == 0 and use.op in (*SLICES, "dynamic-update-slice") for use, position in uses
        ):
            read = sum(
                sum(shape.bytes for shape in use.shapes) for use, _ in uses if use.op in SLICES
            )
            total += min(read, operand.bytes)
            for use in updates:
                update = body[use.operands[1]]
                written -= max(operand.bytes - sum(shape.bytes for shape in update.shapes), 0)
        else:
            total += operand.bytes
    return total + max(written, 0)
