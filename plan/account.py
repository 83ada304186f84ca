"""Compiles a program and accounts for it: memory, FLOPs, traffic, and the least time they allow.

Nothing is run.
"""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from plan.flops import Flops, program_flops
from plan.programs import Program
from plan.topology import CHIPS, Chip, capacity
from plan.traffic import Traffic, traffic

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Accounts for one program. Bytes are those of one device; seconds are lower bounds."""

    program: str
    fits: bool
    bytes: dict[str, int]  # by kind; of what could not be compiled, its arguments alone
    total_bytes: int
    capacity_bytes: int | None
    refusal: str  # the compiler's words if it ran out of memory; else ""
    compile_seconds: float
    flops: Flops
    formula_flops: float
    reported_flops: float | None  # one device's, by XLA's cost_analysis: a loop's body counts once
    traffic: Traffic | None
    seconds: dict[str, float]  # by what is the limit: "compute", "hbm", "links"

    def record(self) -> dict[str, Any]:
        """Returns the plan as JSON has it."""
        return dataclasses.asdict(self) | {
            "flops": self.flops._asdict(),
            "traffic": self.traffic and self.traffic._asdict(),
        }


class Memory(NamedTuple):
    """The memory of one device that a program takes, in bytes."""

    by_kind: dict[str, int]
    total: int
    capacity: int | None  # None where it is not known


def make_plan(name: str, program: Program, mesh: Mesh) -> Plan:
    """Compiles a program for the devices of a mesh and accounts for it.

    A program that is too large for the device is planned too, with what is known of it; any other
    error of the compiler is raised.

    Args:
      name: what the plan calls the program.
      program: to be compiled, with `mesh` as the ambient mesh.
      mesh: the devices, all of one kind.
    """
    device = mesh.devices.flat[0]
    traced = program.jitted.trace(*program.arguments)
    flops = program_flops(traced.jaxpr, program.trip_count)
    started = time.monotonic()
    try:
        compiled, refusal = traced.lower().compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, str(error)
    compile_seconds = time.monotonic() - started
    if compiled is None:
        memory, reported, moved = _refused_memory(program, refusal, capacity(device)), None, None
    else:
        memory = _compiled_memory(program, compiled, capacity(device))
        reported = (compiled.cost_analysis() or {}).get("flops")
        moved = traffic(compiled.as_text() or "")
    return Plan(
        program=name,
        fits=not refusal and (memory.capacity is None or memory.total <= memory.capacity),
        bytes=memory.by_kind,
        total_bytes=memory.total,
        capacity_bytes=memory.capacity,
        refusal=refusal,
        compile_seconds=compile_seconds,
        flops=flops,
        formula_flops=program.formula_flops,
        reported_flops=reported,
        traffic=moved,
        seconds=_least_seconds(flops, moved, mesh, CHIPS.get(device.device_kind)),
    )


def _compiled_memory(
    program: Program, compiled: jax.stages.Compiled, capacity_bytes: int | None
) -> Memory:
    """Returns the memory of a compiled program, by the compiler's analysis."""
    analysis: Any = compiled.memory_analysis()
    arguments = sum(program.argument_bytes.values())
    sizes = program.argument_bytes | {
        "padding of arguments": max(analysis.argument_size_in_bytes - arguments, 0),
        "output": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    sizes |= program.waiting_bytes
    return Memory(sizes, sum(sizes.values()), capacity_bytes)


def _refused_memory(program: Program, refusal: str, capacity_bytes: int | None) -> Memory:
    arguments = sum(program.argument_bytes.values())
    needed, capacity_bytes = memory_in_refusal(refusal, arguments, capacity_bytes)
    total = needed + sum(program.waiting_bytes.values())
    return Memory(program.argument_bytes | program.waiting_bytes, total, capacity_bytes)


def memory_in_refusal(
    message: str, argument_bytes: int, capacity_bytes: int | None
) -> tuple[int, int | None]:
    """Returns (bytes needed, bytes there are) as a compiler says them that ran out of memory.

    It is (0, capacity_bytes) if the message has no figures.

    Args:
      message: the compiler's.
      argument_bytes: what the arguments take, which some messages leave out.
      capacity_bytes: what is known otherwise of the device's memory.
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message):
        argument_bytes = 0  # they are in the figure
    else:
        found = re.search(
            r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message
        )
    if found is None:
        return 0, capacity_bytes
    needed, needed_unit, there, there_unit = found.groups()
    return (
        argument_bytes + int(float(needed) * UNITS[needed_unit]),
        int(float(there) * UNITS[there_unit]),
    )


def _least_seconds(
    flops: Flops, moved: Traffic | None, mesh: Mesh, chip: Chip | None
) -> dict[str, float]:
    """Returns what a run takes at the chip's peak rates, by limit; {} for an unknown chip."""
    if chip is None:
        return {}
    # A device's buffer of a grouped matmul has room for all choices of its expert group, of which
    # its own experts get their share.
    of_device = (flops.dense + flops.grouped / mesh.shape["expert"]) / mesh.size
    seconds = {"compute": of_device / chip.flops}
    if moved is not None:
        received = sum(received for _, received in moved.collectives.values())
        seconds |= {
            "hbm": moved.hbm_bytes / chip.hbm_bandwidth,
            "links": received / chip.link_bandwidth,
        }
    return seconds


def describe(plan: Plan, devices: int) -> list[str]:
    """Returns the plan of a program for so many devices in lines for people."""
    lines = [f"{plan.program}: {_verdict(plan)}"]
    lines += [_line(kind, _gib(size)) for kind, size in plan.bytes.items() if size]
    there = f" of {_gib(plan.capacity_bytes).strip()}" if plan.capacity_bytes else ""
    lines += [_line("total per device", _gib(plan.total_bytes) + there)]
    lines += _flops_lines(plan, devices)
    lines += _traffic_lines(plan.traffic) if plan.traffic else []
    if plan.seconds:
        lines += [_line("no faster than", f"{max(plan.seconds.values()):.4g} s (static estimate)")]
        lines += [_line(f"  by {kind}", f"{it:.4g} s") for kind, it in plan.seconds.items()]
    return [*lines, _line("compiled in", f"{plan.compile_seconds:.1f} s")]


def _flops_lines(plan: Plan, devices: int) -> list[str]:
    """Describes the program's FLOPs by jaxpr, by formula and by XLA's cost_analysis."""
    total, grouped = plan.flops.dense + plan.flops.grouped, plan.flops.grouped
    lines = [
        _line(
            "FLOPs",
            f"{total:.4g}, per device {total / devices:.4g} ({grouped / devices:.4g} grouped)",
        ),
        _line(
            "FLOPs by formula",
            f"{plan.formula_flops:.4g} in all: {plan.formula_flops / total:.0%} of the program's",
        ),
    ]
    if plan.reported_flops:
        reported = f"{plan.reported_flops:.4g} per device, a loop's body counted once"
        lines += [_line("FLOPs by cost_analysis", reported)]
    return lines


def _traffic_lines(moved: Traffic) -> list[str]:
    """Describes what collectives and HBM move, one kind a line."""
    lines = [
        _line(kind, f"{count:>10,} x, {_gib(received).strip()} received")
        for kind, (count, received) in moved.collectives.items()
    ]
    lines += [_line("HBM traffic", _gib(moved.hbm_bytes))]
    if moved.unknown_loops:
        counted = f"{moved.unknown_loops:>10,}, counted as one round each"
        lines += [_line("loops of unknown length", counted)]
    return lines


def _line(name: str, value: str) -> str:
    return f"  {name:<28}{value}"


def _verdict(plan: Plan) -> str:
    if plan.capacity_bytes is None:
        return "the capacity of this device is not known"
    if plan.refusal and plan.total_bytes <= plan.capacity_bytes:
        return f"does not fit ({plan.refusal.splitlines()[0]})"
    over = plan.total_bytes - plan.capacity_bytes
    if over > 0:
        return f"does not fit, {_gib(over).strip()} too much"
    return f"fits, {_gib(-over).strip()} to spare"


def _gib(size: float) -> str:
    return f"{size / 2**30:10.3f} GiB"
