"""Train steps of DeepSeek-V3.2's shape through the TPU's own compiler, with the kernels in them: on a pod, and a layer of a row of 128K tokens on one chip."""

import re

import jax
import pytest

from launch.config_file import get_config
from launch.door import parse
from launch.hlo import parse as parse_hlo
from launch.hlo import scheduled
from launch.plan import train_program
from launch.topology import CHIPS, topology_devices
from model.kernels.keyset import words
from model.sharding import MESH_AXES, make_mesh

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("little_effort")]
SLOW = pytest.mark.slow  # minutes each: `make test-compile-all`

KERNELS = {"warmup": {"select", "sparse_attention", "indexer_normaliser", "indexer_kl"}}
KERNELS["sparse"] = KERNELS["warmup"] | {"sparse_attention_backward"}


def compiled(topology: str, devices: int | None = None, **changes):
    """The train step of configs/deepseek_v32.py with `section__field=value` changed, for the first devices of a topology: (program, bytes of a device)."""
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
        step = train_program(config, config.model, mesh)
        program = step.jitted.lower(*step.arguments).compile()
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{used / 2**30:.1f} GiB of {CHIPS[mesh.devices.flat[0].device_kind].hbm / 2**30:.0f}")
    assert used < CHIPS[mesh.devices.flat[0].device_kind].hbm
    return program


def assert_sparse(program, stage: str, length: int, largest: int):
    """The stage's kernels are in it, no array in memory has two dimensions of a row's length, and none more bytes than `largest`."""
    text = program.as_text()
    square = re.findall(rf"\w+\[(?:\d+,)*{length},(?:\d+,)*{length}(?:,\d+)*\]", text)
    assert not square, square[:3]
    computations, entry = parse_hlo(text)
    instructions = [instruction for _, instruction, _, fused in scheduled(computations, entry, set()) if not fused]
    called = {instruction.name.partition(".")[0] for instruction in instructions if "tpu_custom_call" in instruction.attributes}
    assert called >= KERNELS[stage], called
    bytes_of = {instruction.name: max((shape.bytes for shape in instruction.shapes if shape.in_hbm), default=0) for instruction in instructions}
    print(called, f"{max(bytes_of.values()) / 2**30:.2f} GiB in", max(bytes_of, key=bytes_of.get))
    assert max(bytes_of.values()) <= largest


@pytest.mark.parametrize("stage", ["warmup", pytest.param("sparse", marks=SLOW)])
def test_a_layer_of_128k_tokens_on_one_chip(stage):
    """A device's part of it, 16 of 128 heads and an eighth of the FFN: forward, backward and optimizer within a v6e's 32 GB. An array of L x L would have
    16 GiB even as bytes; the largest there is are hidden states in float32, then a bit a key."""
    L, width, one_chip = 131_072, 7_168, {f"mesh__{axis}": 1 for axis in MESH_AXES}
    one_layer = {"model__layers": 1, "model__dense_layers": 1, "model__dense_width": 18_432 // 8, "model__mtp_depth": 0, "model__vocab": 1_024}
    one_row = {"data__sequence": L, "data__batch": 1, "train__microbatches": 1, "train__stage": stage}
    program = compiled("v6e:2x2", 1, model__attention__heads=16, **one_layer, **one_row, **one_chip)
    assert_sparse(program, stage, L, largest=max(4 * L * width, 4 * L * words(L)))


@pytest.mark.parametrize(("stage", "layers"), [("sparse", 61), *(pytest.param(*case, marks=SLOW) for case in [("sparse", 5), ("warmup", 5), ("warmup", 61)])])
def test_the_whole_model_on_a_pod(stage, layers):
    """512 chips of v5p, a row of 4,096 tokens to each group of 8. The largest array is the experts' rows: room for 8 choices of the tokens of 8 groups, and a
    block to each of a device's 32 experts."""
    program = compiled("v5p:8x8x8", model__layers=layers, data__batch=64, train__microbatches=1, train__stage=stage)
    assert_sparse(program, stage, 4_096, largest=(8 * 4_096 * 8 + 32 * 512) * 7_168 * 2)
