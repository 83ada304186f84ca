"""Will it fit, and how long must it take at least? Compiles a config's train step and rollout for a
TPU topology, without a TPU, and runs nothing.

    .venv-compile/bin/python -m launch.plan --config=configs/deepseek_v32.py --topology=v5p:8x8x8
    (make .venv-compile/installed makes it) .venv-compile/bin/python -m launch.plan
    --config=configs/moe_16b.py --topology=v5p:2x2x4 --what=rollout --json=plan.json python -m
    launch.plan --config=configs/base.py --pretend_devices=8

Without --topology it plans for the devices of this process. docs/plan.md says what each figure
means. Every time is a static estimate, none is measured.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from errors import UserError
from experiment.command_line import Flag, command
from experiment.schema import Config
from experiment.setup import print_summary
from model.config import ModelConfig
from model.sharding import batch_sharding, batch_shards, make_mesh, replicated
from plan.flops import Flops, program_flops, rollout_formula, train_formula
from plan.hlo import Traffic, traffic
from plan.topology import CHIPS, Chip, capacity, topology_devices
from rl.algorithms import get_algorithm
from rl.sampler import sample
from train.objective import language_objective, trained_mtp
from train.optimizer import make_optimizer
from train.state import TrainState, abstract_state, count_parameters
from train.step import abstract_batch, jit_step, make_step

PROGRAMS = {"train": ("train",), "rollout": ("rollout",), "both": ("train", "rollout")}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """Something to compile. Bytes are those of one device."""

    jitted: Callable
    arguments: tuple  # jax.ShapeDtypeStruct, sharded
    held: dict[str, int]  # its arguments by kind
    beside: dict[str, int]  # what else the run keeps on the device meanwhile
    rounds: int  # of its `while` loop
    formula: float  # FLOPs that the mathematics needs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one program. Bytes are those of one device; seconds are lower bounds."""

    program: str
    fits: bool
    bytes: dict[str, int]  # by kind; of what could not be compiled, its arguments alone
    total_bytes: int
    capacity_bytes: int | None
    refusal: str  # the compiler's words, if it would not
    compile_seconds: float
    flops: Flops
    formula_flops: float
    reported_flops: (
        float | None
    )  # a device's by XLA's cost_analysis, which counts the body of a loop once
    traffic: Traffic | None
    seconds: dict[str, float]  # by what would be the limit: "compute", "hbm", "links"


def run(config: Config, topology: str, what: str, json: str) -> None:
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config.mesh, devices)
    model = sized(config)
    print_summary(
        dataclasses.replace(config, model=model), *count_parameters(model), mesh, trains=True
    )
    plans = []
    with jax.set_mesh(mesh), for_absent_devices(model):
        for name in PROGRAMS[what]:
            plans.append(plan(name, PREPARE[name](config, model, mesh), mesh))
            print("\n".join(["", *describe(plans[-1], mesh)]), flush=True)
    if json:
        write(Path(json), config, topology, mesh, plans)


def for_absent_devices(model: ModelConfig) -> AbstractContextManager:
    """tokamax traces nothing for devices that this process lacks, unless it is told."""
    if model.expert_matmul != "tokamax" or importlib.util.find_spec("tokamax") is None:
        return nullcontext()
    import tokamax

    return tokamax.config.cross_compile(True)


def sized(config: Config) -> ModelConfig:
    """The model with its vocabulary, which a run would take from its tokenizer."""
    if config.model.vocab_size:
        return config.model
    if config.tokenizer.kind != "bpe":
        raise UserError(
            "model.vocab_size = 0 takes the tokenizer's, and a plan makes no tokenizer; give --config.model.vocab_size=N"
        )
    return dataclasses.replace(config.model, vocab_size=config.tokenizer.vocab_size)


def train_program(config: Config, model: ModelConfig, mesh: Mesh) -> Program:
    """The step of launch/pretrain.py."""
    data, train = config.data, config.train
    divides("data.batch_size / train.microbatches", data.batch_size // train.microbatches, mesh)
    optimizer = make_optimizer(train)
    state = abstract_state(model, optimizer, mesh)
    step = jit_step(
        make_step(model, train, language_objective(model, train), optimizer), state, mesh
    )
    batch = abstract_batch(data.batch_size, data.seq_len, mesh)
    held = held_bytes(state) | {"batch": device_bytes(batch)}
    formula = train_formula(
        dataclasses.replace(model, num_nextn_predict_layers=trained_mtp(model, train)),
        train.stage,
        data.batch_size,
        data.seq_len,
    )
    return Program(step, (state, batch), held, {}, 1, formula)


def rollout_program(config: Config, model: ModelConfig, mesh: Mesh) -> Program:
    """The sampler of launch/reinforce.py; the trainer's state waits on the device meanwhile."""
    r, sampling = config.reinforce, config.sampling
    divides("reinforce.prompts_per_step", r.prompts_per_step, mesh)
    state = abstract_state(model, make_optimizer(config.train), mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        state.variables,
        rows_of(mesh, r.prompts_per_step, sampling.max_prompt_tokens),
        rows_of(mesh, r.prompts_per_step, sampling.max_prompt_tokens),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)),
    )
    held = held_bytes(state)
    beside = {"moments (waiting)": held.pop("moments")}
    if (
        get_algorithm(
            r.algorithm, max_completion=sampling.max_new_tokens, kl_weight=r.kl_weight
        ).divergence
        is not None
    ):
        beside["reference policy (waiting)"] = held["parameters"]
    held["batch"] = device_bytes(arguments[1:3])
    # Which ids stop and pad does not matter to a program's size.
    sampler = jax.jit(functools.partial(sample, model, sampling, (1,), 0, group=r.group_size))
    formula = rollout_formula(model, sampling, r.prompts_per_step, r.group_size)
    return Program(sampler, arguments, held, beside, sampling.max_new_tokens, formula)


PREPARE: dict[str, Callable[[Config, ModelConfig, Mesh], Program]] = {
    "train": train_program,
    "rollout": rollout_program,
}


def divides(field: str, rows: int, mesh: Mesh) -> None:
    if rows % batch_shards(mesh):
        raise UserError(
            f"{field} = {rows}: does not divide over the {batch_shards(mesh)} devices of mesh axes data x fsdp x expert; change it or the mesh"
        )


def rows_of(mesh: Mesh, rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))


def held_bytes(state: TrainState) -> dict[str, int]:
    return {
        "parameters": device_bytes((state.params, state.router)),
        "moments": device_bytes(state.opt_state),
    }


def device_bytes(tree: Any) -> int:
    """Of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def plan(name: str, program: Program, mesh: Mesh) -> Plan:
    """Compiles. Being too large for the device is an answer; any other error of the compiler is an
    error.
    """
    device = mesh.devices.flat[0]
    traced = program.jitted.trace(*program.arguments)
    flops = program_flops(traced.jaxpr, program.rounds)
    room = capacity(device)
    known = {"program": name, "flops": flops, "formula_flops": program.formula}
    began = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, room = exhausted(str(error), sum(program.held.values()), room)
        seconds = compute_seconds(flops, mesh, CHIPS.get(device.device_kind))
        found = {
            "fits": False,
            "bytes": program.held | program.beside,
            "total_bytes": needed + sum(program.beside.values()),
            "capacity_bytes": room,
        }
        return Plan(
            **known,
            **found,
            refusal=str(error),
            compile_seconds=time.monotonic() - began,
            reported_flops=None,
            traffic=None,
            seconds=seconds,
        )
    elapsed = time.monotonic() - began
    memory, reported = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = program.held | {
        "padding of arguments": max(memory.argument_size_in_bytes - sum(program.held.values()), 0),
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    sizes |= program.beside
    total, moved = sum(sizes.values()), traffic(compiled.as_text())
    found = {
        "fits": room is None or total <= room,
        "bytes": sizes,
        "total_bytes": total,
        "capacity_bytes": room,
    }
    seconds = compute_seconds(flops, mesh, CHIPS.get(device.device_kind)) | memory_seconds(
        moved, CHIPS.get(device.device_kind)
    )
    return Plan(
        **known,
        **found,
        refusal="",
        compile_seconds=elapsed,
        reported_flops=(reported or {}).get("flops"),
        traffic=moved,
        seconds=seconds,
    )


def exhausted(message: str, held: int, room: int | None) -> tuple[int, int | None]:
    """(bytes needed, bytes there are), as a compiler that ran out of memory says them; (0, room) if
    it does not. `held` is what the arguments take.
    """
    if whole := re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message):
        held, found = 0, whole
    else:
        found = re.search(
            r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message
        )
    if found is None:
        return 0, room
    needed, needed_unit, there, there_unit = found.groups()
    return held + int(float(needed) * UNITS[needed_unit]), int(float(there) * UNITS[there_unit])


def compute_seconds(flops: Flops, mesh: Mesh, chip: Chip | None) -> dict[str, float]:
    """At peak. A device's buffer of a grouped matmul has room for all choices of its expert group,
    of which its own experts get their share.
    """
    if chip is None:
        return {}
    return {
        "compute": (flops.dense + flops.grouped / mesh.shape["expert"]) / mesh.size / chip.flops
    }


def memory_seconds(moved: Traffic, chip: Chip | None) -> dict[str, float]:
    if chip is None:
        return {}
    return {
        "hbm": moved.hbm_bytes / chip.hbm_bandwidth,
        "links": sum(received for _, received in moved.collectives.values()) / chip.link_bandwidth,
    }


def describe(plan: Plan, mesh: Mesh) -> list[str]:
    """The plan in lines for people."""
    lines = [f"{plan.program}: {verdict(plan)}"]
    lines += [f"  {kind:<28}{gib(size)}" for kind, size in plan.bytes.items() if size]
    lines += [
        f"  {'total per device':<28}{gib(plan.total_bytes)}"
        + (f" of {gib(plan.capacity_bytes).strip()}" if plan.capacity_bytes else "")
    ]
    whole, grouped = plan.flops.dense + plan.flops.grouped, plan.flops.grouped
    lines += [
        f"  FLOPs                       {whole:.4g} in all, {whole / mesh.size:.4g} per device ({grouped / mesh.size:.4g} of it grouped)"
    ]
    lines += [
        f"  FLOPs by formula            {plan.formula_flops:.4g} in all: {plan.formula_flops / whole:.0%} of the program's"
    ]
    if plan.reported_flops:
        lines += [
            f"  FLOPs by cost_analysis      {plan.reported_flops:.4g} per device, each loop's body counted once"
        ]
    if plan.traffic:
        lines += [
            f"  {kind:<28}{count:>10,} x, {gib(received).strip()} received"
            for kind, (count, received) in plan.traffic.collectives.items()
        ]
        lines += [f"  {'HBM traffic':<28}{gib(plan.traffic.hbm_bytes)}"]
        if plan.traffic.unknown_loops:
            lines += [
                f"  {'loops of unknown length':<28}{plan.traffic.unknown_loops:>10,}, counted as one round each"
            ]
    if plan.seconds:
        parts = ", ".join(f"{kind} {seconds:.4g} s" for kind, seconds in plan.seconds.items())
        lines += [
            f"  no faster than              {max(plan.seconds.values()):.4g} s (static estimate: {parts})"
        ]
    lines += [f"  compiled in                 {plan.compile_seconds:.1f} s"]
    return lines


def verdict(plan: Plan) -> str:
    if plan.capacity_bytes is None:
        return "the capacity of this device is not known"
    if plan.refusal and plan.total_bytes <= plan.capacity_bytes:
        return f"does not fit ({plan.refusal.splitlines()[0]})"
    over = plan.total_bytes - plan.capacity_bytes
    return (
        f"does not fit, {gib(over).strip()} too much"
        if over > 0
        else f"fits, {gib(-over).strip()} to spare"
    )


def gib(size: float) -> str:
    return f"{size / 2**30:10.3f} GiB"


def write(path: Path, config: Config, topology: str, mesh: Mesh, plans: list[Plan]) -> None:
    record = {
        "topology": topology,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "config": dataclasses.asdict(config),
        "plans": [
            dataclasses.asdict(plan)
            | {"flops": plan.flops._asdict(), "traffic": plan.traffic and plan.traffic._asdict()}
            for plan in plans
        ],
    }
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"--json={path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    flags = {
        "topology": Flag(
            "",
            "a TPU topology, KIND:AxB or KIND:AxBxC such as v5p:4x4x4; without it, the devices of this process",
        ),
        "what": Flag("both", "which program", choices=tuple(PROGRAMS)),
        "json": Flag("", "a file to write the figures to, too"),
    }
    command(run, workdir=False, flags=flags)
