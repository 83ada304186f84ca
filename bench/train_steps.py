r"""Compiles whole train steps of DeepSeek-V3.2's shape for TPUs: what a device must hold in memory.

    .venv-compile/bin/python -m bench.train_steps --step=row --stage=sparse
    .venv-compile/bin/python -m bench.train_steps --step=pod --stage=warmup --layers=61

(make test-compile makes that environment.) The steps are compiled by the TPU's compiler, with the
kernels in them. The figures are static: nothing is run. One JSON line a step;
bench/results/train_steps_static.json has them all. tests/compile/test_tpu_train.py compiles the
same steps.
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
from experiment.command_line import command
from experiment.config_files import ConfigSource
from experiment.flags import Flag
from experiment.schema import parse as parse_config
from model.mesh import MESH_AXES
from model.sharding import make_mesh
from plan.hlo import Computation, executions, parse
from plan.programs import train_program
from plan.topology import CHIPS, GIB, topology_devices
from plan.traffic import FREE

ROW = 131_072  # tokens


class Step(NamedTuple):
    """A train step to compile."""

    topology: str
    devices: int
    overrides: tuple[str, ...]  # of configs/deepseek_v32.py, FIELD=VALUE
    description: str


class StepMemory(NamedTuple):
    """Describes the memory of one device that a compiled step takes."""

    bytes: int
    largest: int  # bytes of the largest array that is written to HBM
    square: str  # the shape of an array with as many elements as a row has pairs, "" without one
    live_bitmasks: int  # with a bit for each pair of a whole row, at most at one time
    kernels: frozenset[str]


def step_of(name: str, stage: str, layers: int) -> Step:
    """Returns one of the two steps that are compiled.

    Args:
      name: "row" is dense layers and one row of 128K, heads and FFN sharded over eight v6e; "pod"
        is 64 rows of 4,096 on 512 v5p, a row to each group of eight.
      stage: "warmup" or "sparse".
      layers: of the model.

    Raises:
      UserError: there is no such step.
    """
    shared = (
        "train.microbatches=1",
        f"train.stage={stage}",
        f"model.num_hidden_layers={layers}",
    )
    if name == "pod":
        description = f"{layers} layers and MTP, 64 rows of 4096 on 512 chips of v5p"
        return Step("v5p:8x8x8", 512, (*shared, "data.batch_size=64"), description)
    if name != "row":
        raise UserError(f"--step={name}: must be row or pod")
    row = (
        *(f"mesh.{axis}={8 if axis == 'tensor' else 1}" for axis in MESH_AXES),
        f"model.first_k_dense_replace={layers}",
        "model.num_nextn_predict_layers=0",
        "model.vocab_size=1024",
        f"data.seq_len={ROW}",
        "data.batch_size=1",
    )
    description = f"{layers} dense layer(s), a row of 128K, 128 heads over eight chips of v6e"
    return Step("v6e:2x4", 8, (*shared, *row), description)


def compile_step(step: Step) -> jax.stages.Compiled:
    """Compiles a step for the first devices of its topology."""
    overrides = tuple(f"--config.{override}" for override in step.overrides)
    config = parse_config(ConfigSource("configs/deepseek_v32.py", overrides).read())
    mesh = make_mesh(config.mesh, topology_devices(step.topology)[: step.devices])
    with jax.set_mesh(mesh):
        program = train_program(config.model, config.train, config.data, mesh)
        return program.jitted.lower(*program.arguments).compile()


def step_memory(program: jax.stages.Compiled, length: int) -> StepMemory:
    """Reads the memory of a compiled step whose rows have `length` tokens."""
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None
    computations, entry = parse(text)
    scheduled = [
        execution for execution in executions(computations, entry, set()) if not execution.fused
    ]
    shapes = (shape for execution in scheduled for shape in execution.instruction.shapes)
    return StepMemory(
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        max(shape.bytes for shape in shapes if shape.in_hbm),
        _square_array(text, length),
        max(
            live_bitmasks(computations[name], text, length)
            for name in {execution.computation for execution in scheduled}
        ),
        frozenset(
            name.partition(".")[0]
            for computation in computations.values()
            for name, instruction in computation.items()
            if "tpu_custom_call" in instruction.attributes
        ),
    )


def _square_array(text: str, length: int) -> str:
    """Returns the dimensions of an array with an element for each pair of a row's tokens, or ""."""
    two_sides = rf"(^|,){length},(.*,)?{length}(,|$)"
    for dims in set(re.findall(r"\w+\[([\d,]+)\]", text)):
        large = math.prod(map(int, dims.split(","))) >= length**2
        if large and (length >= ROW or re.search(two_sides, dims)):
            return dims
    return ""


def live_bitmasks(computation: Computation, text: str, length: int) -> int:
    """Counts the bitmasks of a row that are alive at one time, at most.

    They are int32 arrays with a bit for each pair of a row's tokens, made in this computation. Each
    lives from where it is made to its last use.
    """
    bitmasks = {
        name
        for name, dims in re.findall(r"%?([\w.\-]+) = s32\[([\d,]+)\]", text)
        if 32 * math.prod(map(int, dims.split(","))) >= length**2
    }
    stands_for: dict[str, set[str]] = {}  # name -> the bitmasks that it is, or has in its tuple
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, (name, instruction) in enumerate(computation.items()):
        used = {mask for operand in instruction.operands for mask in stands_for.get(operand, ())}
        last |= dict.fromkeys(used, at)
        free = instruction.opcode in FREE
        part_of_result = (
            instruction.opcode == "get-tuple-element"
            and computation[instruction.operands[0]].opcode not in FREE
        )
        if name in bitmasks and (not free or part_of_result):
            used, first[name], last[name] = {name}, at, at
        stands_for[name] = used if free or name in first else set()
    live = collections.Counter(at for name in first for at in range(first[name], last[name] + 1))
    return max(live.values(), default=0)


def run(step: str, stage: str, layers: int) -> None:
    """Compiles a step and prints what a device must hold."""
    chosen = step_of(step, stage, layers)
    # As in the tests: the compiler's effort does nothing to what memory holds.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    memory = step_memory(compile_step(chosen), 4_096 if step == "pod" else ROW)
    hbm = CHIPS[topology_devices(chosen.topology)[0].device_kind].hbm
    line = {
        "bench": "train_steps",
        "static": True,
        "what": chosen.description,
        "stage": stage,
        "topology": chosen.topology,
        "devices": chosen.devices,
        "gib": round(memory.bytes / GIB, 2),
        "of_gib": round(hbm / GIB, 2),
        "largest_array_gib": round(memory.largest / GIB, 2),
        "sets_of_a_row_at_once": memory.live_bitmasks,
        "square": memory.square,
        "jax": version("jax"),
        "libtpu": version("libtpu"),
        "command": "python -m bench.train_steps " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    flags = {
        "step": Flag("row", "row or pod"),
        "stage": Flag("sparse", "warmup or sparse"),
        "layers": Flag(1, "of the model"),
    }
    command(run, config="none", workdir=False, flags=flags)
