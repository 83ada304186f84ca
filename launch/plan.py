r"""Plans a run without its devices: whether it fits, and how long it must take at least.

Compiles a config's train step and rollout for a TPU topology, without a TPU, and runs nothing.

    .venv-compile/bin/python -m launch.plan --config=configs/deepseek_v32.py --topology=v5p:8x8x8
    .venv-compile/bin/python -m launch.plan --config=configs/moe_16b.py --topology=v5p:2x2x4 \
        --what=rollout --json=plan.json
    python -m launch.plan --config=configs/base.py --pretend_devices=8

(make .venv-compile/installed makes that environment.) Without --topology it plans for the devices
of this process. docs/plan.md says what each figure means. Every time is a static estimate, none is
measured.
"""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from experiment.command_line import command
from experiment.flags import Flag
from experiment.schema import Config
from experiment.setup import print_summary
from files import write_json
from model.config import ModelConfig
from model.sharding import make_mesh
from plan.account import describe, make_plan
from plan.programs import (
    Program,
    absent_devices,
    rollout_program,
    train_program,
    with_planned_vocab_size,
)
from plan.topology import topology_devices
from train.preferences import get_preference
from train.state import count_parameters

PROGRAMS = {"train": ("train",), "rollout": ("rollout",), "both": ("train", "rollout")}
FLAGS = {
    "topology": Flag(
        "",
        "a TPU topology, KIND:AxB or KIND:AxBxC such as v5p:4x4x4; "
        "without it, the devices of this process",
    ),
    "what": Flag("both", "which program", choices=tuple(PROGRAMS)),
    "json": Flag("", "a file to write the figures to, too"),
}


def run(config: Config, topology: str, what: str, json: str) -> None:
    """Plans the programs that `what` names and prints each plan, or writes them to `json` too."""
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config.mesh, devices)
    model = with_planned_vocab_size(config.model, config.tokenizer)
    with_vocab_size = dataclasses.replace(config, model=model)
    print_summary(with_vocab_size, *count_parameters(model), mesh, trains=True)
    plans = []
    with jax.set_mesh(mesh), absent_devices(model):
        for name in PROGRAMS[what]:
            plans.append(make_plan(name, program(name, config, model, mesh), mesh))
            print("\n".join(["", *describe(plans[-1], mesh.size)]), flush=True)
    if json:
        record = {
            "topology": topology,
            "device": devices[0].device_kind,
            "mesh": dict(mesh.shape),
            "config": dataclasses.asdict(config),
            "plans": [plan.record() for plan in plans],
        }
        write_json(Path(json), record)


def program(name: str, config: Config, model: ModelConfig, mesh: Mesh) -> Program:
    """Builds the program "train" or "rollout" of a config, with `model` in place of its own."""
    if name == "train":
        tuned = config.finetune
        preference = get_preference(tuned.loss) if tuned.learns_from_pairs else None
        return train_program(model, config.train, config.data, mesh, preference)
    return rollout_program(model, config.train, config.sampling, config.reinforce, mesh)


if __name__ == "__main__":
    command(run, workdir=False, flags=FLAGS)
