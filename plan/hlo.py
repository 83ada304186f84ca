"""Reads the scheduled HLO text of one device: its instructions, and how often each of them runs.

The text is that of `compiled.as_text()`. XLA's own `cost_analysis()` counts the body of a loop
once; here it counts as often as it runs.
"""

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
# Attributes that name the computations an instruction calls.
CALLS = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")


class Shape(NamedTuple):
    """One array of an instruction's result."""

    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of its result; several for a tuple
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # from the opening parenthesis on: operands, then attributes

    @property
    def bytes(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)

    def called(self, *names: str) -> list[str]:
        """Returns the computations that it names in any of these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(found))

    @property
    def parameter_number(self) -> int | None:
        """The k of `parameter(k)`; None if the instruction is no parameter."""
        found = re.match(r"(\d+)\)", self.attributes) if self.opcode == "parameter" else None
        return int(found[1]) if found else None


Computation = dict[str, Instruction]


class Execution(NamedTuple):
    """An instruction that runs."""

    computation: str
    instruction: Instruction
    times: int  # in one run of the program
    fused: bool  # inside a fusion, so its operands and result need not touch memory


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the name of the one where the program begins."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            current[found[1]] = _instruction(found[1], line[found.end() :])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses what stands behind the `=`: RESULT OPCODE(OPERANDS), ATTRIBUTES."""
    result = text[: _closing(text)] if text.startswith("(") else text[: text.index(" ")]
    opcode, _, rest = text[len(result) :].strip().partition("(")
    operands = rest[: _closing("(" + rest) - 1]
    return Instruction(
        name,
        tuple(_shapes(result)),
        opcode,
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        rest,
    )


def _closing(text: str) -> int:
    """Returns the position just past the parenthesis that closes the one `text` begins with."""
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


def executions(
    computations: dict[str, Computation],
    name: str,
    unknown_loops: set[str],
    times: int = 1,
    fused: bool = False,
) -> Iterator[Execution]:
    """Yields every instruction that runs when the computation `name` does.

    Fusions are entered only where there is a collective inside. Names of loops of unknown length
    are added to `unknown_loops`; such a loop counts as one iteration.
    """
    for instruction in computations[name].values():
        yield Execution(name, instruction, times, fused)
        inner, iterations = instruction.called(*CALLS), 1
        if instruction.opcode == "while":
            inner, known = instruction.called("body"), trip_count(instruction, computations)
            if known is None:
                unknown_loops.add(instruction.name)
            iterations = 1 if known is None else known
        elif instruction.opcode == "fusion":
            inner = [called for called in inner if _has_collective(called, computations)]
        elif instruction.opcode not in ("call", "call-start", "async-start", "conditional"):
            continue  # to_apply of a reduction or a collective is one scalar operation
        for called in inner:
            yield from executions(
                computations,
                called,
                unknown_loops,
                times * iterations,
                fused or instruction.opcode == "fusion",
            )


def _has_collective(name: str, computations: dict[str, Computation]) -> bool:
    return any(collective_kind(inner, name) for inner in computations[name].values())


def collective_kind(instruction: Instruction, computation: str) -> str | None:
    """Returns which of COLLECTIVES an instruction of the named computation is, if any."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # A TPU's reduce-scatter is a fusion of an all-reduce and the slice that each device keeps.
    fused = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if fused else kind


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Returns the most iterations of a loop, or None if they are not known.

    The compiler says them, or the `i < N` in the condition does (JAX's loops count up from 0 by 1).
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (name,) = loop.called("condition")
    condition = computations[name]
    bounds = _compared_constants(condition, condition, None)
    for fusion in condition.values():
        if fusion.opcode == "fusion":
            body = computations[fusion.called("calls")[0]]
            bounds |= _compared_constants(body, condition, fusion)
    return bounds.pop() if len(bounds) == 1 else None


def _compared_constants(
    body: Computation, condition: Computation, fusion: Instruction | None
) -> set[int]:
    """Returns the constants N of each `i < N` in `body`.

    The body is a loop's condition itself, or the computation of a fusion in it, whose parameters
    are that fusion's operands.
    """
    bounds = set()
    for compare in body.values():
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            continue
        bound = body[compare.operands[1]]
        if fusion is not None and (number := bound.parameter_number) is not None:
            bound = condition[fusion.operands[number]]
        if bound.opcode == "constant":
            bounds.add(int(bound.attributes.partition(")")[0]))
    return bounds


def group_size(attributes: str) -> int:
    """Returns the number of devices of one replica group.

    XLA writes the groups in three ways: {{0,1},{2,3}}, [groups,size]<=[...],
    mesh['a'=2,'b'=4] {'b'}.
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
