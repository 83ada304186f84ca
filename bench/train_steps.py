"""Whole train steps of DeepSeek-V3.2's shape through the TPU's compiler, with the kernels in them:
what a device must hold. Static: nothing is run.

    .venv-compile/bin/python -m bench.train_steps --step=row --stage=sparse          (make
    test-compile makes that environment) .venv-compile/bin/python -m bench.train_steps --step=pod
    --stage=warmup --layers=61

One JSON line a step; bench/results/train_steps_static.json has them all.
tests/compile/test_tpu_train.py compiles the same steps.
"""

import collections
import json
import math
import re
import sys
from importlib.metadata import version
from typing import NamedTuple

import jax

from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import get_config
from experiment.schema import parse as parse_config
from launch.plan import train_program
from model.mesh import MESH_AXES
from model.sharding import make_mesh
from plan.hlo import FREE, Computation, parse, scheduled
from plan.topology import CHIPS, GIB, topology_devices

ROW = 131_072  # tokens


class Step(NamedTuple):
    topology: str
    devices: int
    changes: dict  # of configs/deepseek_v32.py, `section__field`
    what: str


class Held(NamedTuple):
    """A device's memory."""

    bytes: int
    largest: int  # array that is written to it
    square: str  # an array of so many elements as a row has pairs, if there is any
    sets: int  # of a bit a pair of a whole row, that live at one time
    kernels: frozenset[str]


def step_of(name: str, stage: str, layers: int) -> Step:
    """ "row": one dense layer and one row of 128K, heads and FFN cut over eight v6e. "pod": 64 rows
    of 4,096 on 512 v5p, a row to each group of eight.
    """
    shared = {"train__microbatches": 1, "train__stage": stage, "model__layers": layers}
    if name == "pod":
        return Step(
            "v5p:8x8x8",
            512,
            shared | {"data__batch": 64},
            f"{layers} layers and MTP, 64 rows of 4096 on 512 chips of v5p",
        )
    if name != "row":
        raise UserError(f"--step={name}: must be row or pod")
    mesh = {f"mesh__{axis}": 1 for axis in MESH_AXES} | {"mesh__tensor": 8}
    row = {
        "model__dense_layers": layers,
        "model__mtp_depth": 0,
        "model__vocab": 1_024,
        "data__sequence": ROW,
        "data__batch": 1,
    }
    return Step(
        "v6e:2x4",
        8,
        shared | mesh | row,
        f"{layers} dense layer(s), a row of 128K, 128 heads over eight chips of v6e",
    )


def compiled(made: Step):
    """The train step, for the first devices of a topology."""
    config = get_config("configs/deepseek_v32.py")
    for name, value in made.changes.items():
        *sections, field = name.split("__")
        section = config
        for one in sections:
            section = section[one]
        section[field] = value
    config = parse_config(config)
    mesh = make_mesh(config.mesh, topology_devices(made.topology)[: made.devices])
    with jax.set_mesh(mesh):
        program = train_program(config, config.model, mesh)
        return program.jitted.lower(*program.arguments).compile()


def held(program, length: int) -> Held:
    """`length`: of a row."""
    memory, text = program.memory_analysis(), program.as_text()
    computations, entry = parse(text)
    found = [
        (where, instruction)
        for where, instruction, _, fused in scheduled(computations, entry, set())
        if not fused
    ]
    arrays = {
        dims: math.prod(map(int, dims.split(",")))
        for dims in set(re.findall(r"\w+\[([\d,]+)\]", text))
    }
    two_sides = rf"(^|,){length},(.*,)?{length}(,|$)"
    square = [
        dims
        for dims, size in arrays.items()
        if size >= length**2 and (length >= ROW or re.search(two_sides, dims))
    ]
    return Held(
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        max(
            shape.bytes for _, instruction in found for shape in instruction.shapes if shape.in_hbm
        ),
        next(iter(square), ""),
        max(
            live_sets(computations[where], text, length) for where in {where for where, _ in found}
        ),
        frozenset(
            name.partition(".")[0]
            for where in computations.values()
            for name, made in where.items()
            if "tpu_custom_call" in made.attributes
        ),
    )


def live_sets(computation: Computation, text: str, length: int) -> int:
    """The most int32 arrays of a bit a pair of a row that live at one time, made in this
    computation: each from where it is made to its last use.
    """
    sets = {
        name
        for name, dims in re.findall(r"%?([\w.\-]+) = s32\[([\d,]+)\]", text)
        if 32 * math.prod(map(int, dims.split(","))) >= length**2
    }
    stands_for, made, last = {}, {}, {}
    for at, (name, instruction) in enumerate(computation.items()):
        used = set().union(*(stands_for.get(operand, set()) for operand in instruction.operands))
        last |= dict.fromkeys(used, at)
        part_of_result = (
            instruction.op == "get-tuple-element"
            and computation[instruction.operands[0]].op not in FREE
        )
        if name in sets and (instruction.op not in FREE or part_of_result):
            used, made[name], last[name] = {name}, at, at
        stands_for[name] = used if instruction.op in FREE or name in made else set()
    live = collections.Counter(at for name in made for at in range(made[name], last[name] + 1))
    return max(live.values(), default=0)


def run(step: str, stage: str, layers: int) -> None:
    made = step_of(step, stage, layers)
    jax.config.update(
        "jax_exec_time_optimization_effort", -1.0
    )  # as in the tests: nothing to what memory holds
    program = compiled(made)
    found = held(program, 4_096 if step == "pod" else ROW)
    hbm = CHIPS[topology_devices(made.topology)[0].device_kind].hbm
    figures = {
        "gib": found.bytes / GIB,
        "of_gib": hbm / GIB,
        "largest_array_gib": found.largest / GIB,
    }
    line = {
        "bench": "train_steps",
        "static": True,
        "what": made.what,
        "stage": stage,
        "topology": made.topology,
        "devices": made.devices,
    }
    line |= {name: round(value, 2) for name, value in figures.items()} | {
        "sets_of_a_row_at_once": found.sets,
        "square": found.square,
    }
    print(
        json.dumps(
            line
            | {
                "jax": version("jax"),
                "libtpu": version("libtpu"),
                "command": "python -m bench.train_steps " + " ".join(sys.argv[1:]),
            }
        )
    )


if __name__ == "__main__":
    flags = {
        "step": Flag("row", "row or pod"),
        "stage": Flag("sparse", "warmup or sparse"),
        "layers": Flag(1, "of the model"),
    }
    command(run, config="none", workdir=False, flags=flags)
