"""Train steps of DeepSeek-V3.2's shape through the TPU's own compiler, with the kernels in them: on a pod, and a layer of a row of 128K tokens on one chip."""

import math
import re

import jax
import pytest

from launch.config_file import get_config
from launch.door import parse
from launch.plan import train_program
from launch.topology import CHIPS, GIB, topology_devices
from model.kernels.keyset import words
from model.sharding import MESH_AXES, make_mesh

pytestmark = pytest.mark.compile

KERNELS = {"warmup": {"select", "sparse_attention", "indexer_normaliser", "indexer_kl"}}
KERNELS["sparse"] = KERNELS["warmup"] | {"sparse_attention_backward"}


def compiled(topology: str, devices: int, **changes):
    """The train step of configs/deepseek_v32.py with `section__field=value` changed, for the first devices of a topology."""
    config = get_config("configs/deepseek_v32.py")
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = config
        for one in sections:
            section = section[one]
        section[field] = value
    config = parse(config)
    mesh = make_mesh(config.mesh, topology_devices(topology)[:devices])
    with jax.set_mesh(mesh):
        program = train_program(config, config.model, mesh)
        return program.jitted.lower(*program.arguments).compile(), mesh.devices.flat[0]


def kernels_of(program: str) -> set[str]:
    return set(re.findall(r'XX', program))


def largest(program: str, length: int) -> int:
    """The most elements of any array in it."""
    return max(math.prod(int(size) for size in shape.split(",")) for shape in re.findall(r"\w+\[([\d,]+)\]", program))


ONE_CHIP = {f"mesh__{axis}": 1 for axis in MESH_AXES}
L = 131_072


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_layer_of_128k_tokens_on_one_chip(stage):
    """One device's part of the layer, 16 of the 128 heads and an eighth of the FFN: forward, backward and optimizer within a v6e's 32 GB."""
    one_layer = {"model__layers": 1, "model__dense_layers": 1, "model__dense_width": 18_432 // 8, "model__mtp_depth": 0, "model__vocab": 1_024}
    one_row = {"data__sequence": L, "data__batch": 1, "train__microbatches": 1, "train__stage": stage}
    program, chip = compiled("v6e:2x2", 1, model__attention__heads=16, **one_layer, **one_row, **ONE_CHIP)
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(stage, f"{used / GIB:.1f} GiB, temp {memory.temp_size_in_bytes / GIB:.1f}")
    text = program.as_text()
    print(kernels_of(text), largest(text, L) / L / words(L))
    assert used < CHIPS[chip.device_kind].hbm
