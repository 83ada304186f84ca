"""A plan's programs are a config's, sharded over its mesh; its accounts are the compiler's."""

import dataclasses
import math

import jax
import pytest

from experiment.config_files import get_config
from experiment.schema import parse
from model.sharding import make_mesh
from plan.account import memory_in_refusal
from plan.flops import program_flops
from plan.programs import (
    absent_devices,
    rollout_program,
    train_program,
    with_planned_vocab_size,
)
from plan.topology import topology_devices
from tests.plan.small_config import SMALL, make_config, needs_libtpu
from train.preferences import get_preference
from train.state import count_parameters

REFERENCE = "reference policy (waiting)"


def test_parameters_shrink_with_the_mesh():
    def parameters(*overrides):
        config = make_config(*SMALL, *overrides)
        mesh = make_mesh(config.mesh)
        program = train_program(config.model, config.train, config.data, mesh)
        return program.argument_bytes["parameters"]

    whole = parameters("mesh.fsdp=1", "mesh.expert=1")
    assert parameters("mesh.fsdp=1", "mesh.expert=2") < whole
    assert whole / 4 < parameters("mesh.fsdp=4", "mesh.expert=1") < whole / 2


def test_vocabulary_is_the_config_s():
    def vocab_size(*overrides):
        config = make_config(*overrides)
        return with_planned_vocab_size(config.model, config.tokenizer).vocab_size

    assert vocab_size("tokenizer.vocab_size=777") == 777
    assert vocab_size("tokenizer.kind=bytes", "model.vocab_size=300") == 300


def test_out_of_memory_has_numbers():
    def numbers(message):
        return memory_in_refusal(message, argument_bytes=7, capacity_bytes=1)

    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (1.50T) exceeds available HBM (95.50G)."
    )
    assert numbers(temporaries) == (7 + 3 * 2**39, 191 * 2**29)
    in_all = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.75G."
    )
    assert numbers(in_all) == (41 * 2**29, 63 * 2**28)
    assert numbers("RESOURCE_EXHAUSTED: vmem") == (0, 1)


# DeepSeek-V3: 671B and 37B (arXiv 2412.19437, abstract), here with the embedding, and 0.85B of
# indexer. DeepSeek-V2-Lite: 15.7B and 2.4B (arXiv 2405.04434, appendix B), here with both
# embeddings, the gate and the indexer.
@pytest.mark.parametrize(
    ("path", "total", "active"),
    [("configs/deepseek_v32.py", 671.9e9, 38.4e9), ("configs/moe_16b.py", 15.9e9, 2.84e9)],
)
def test_the_large_configs_have_their_model_s_size(path, total, active):
    config = parse(get_config(path))
    model = with_planned_vocab_size(config.model, config.tokenizer)
    counted = count_parameters(dataclasses.replace(model, num_nextn_predict_layers=0))
    assert math.isclose(counted[0], total, rel_tol=5e-3)
    assert math.isclose(counted[1], active, rel_tol=2e-2)


@needs_libtpu
def test_plans_tokamax_s_grouped_matmul():
    """Nine products, as megablox's, and three that are computed anew only to be thrown away: its
    backward pass names its result among what it needs.
    """
    pytest.importorskip(
        "tokamax", reason="optional: pip install tokamax, with Python 3.12 or newer"
    )

    def grouped(implementation: str) -> float:
        config = make_config(
            *SMALL,
            "model.hidden_size=128",
            "model.moe.intermediate_size=128",
            "model.moe.num_experts=2",
            "model.moe.num_experts_per_tok=2",
            "model.dtype=bfloat16",
            "data.batch_size=4",
            f"model.expert_matmul={implementation}",
        )
        mesh = make_mesh(config.mesh, topology_devices("v5e:2x2"))
        with jax.set_mesh(mesh), absent_devices(config.model):
            program = train_program(config.model, config.train, config.data, mesh)
            return program_flops(program.jitted.trace(*program.arguments).jaxpr).grouped

    assert grouped("tokamax") == grouped("megablox") * 12 / 9


def test_a_loss_over_pairs_keeps_its_reference_and_reads_what_that_says():
    """Of each token a float32, which a row takes beside its tokens; adapters' base is it itself."""
    plain, lora = (
        make_config(*SMALL, "train.stage=dense", f"train.lora={rank}") for rank in (0, 2)
    )
    mesh = make_mesh(plain.mesh, jax.devices()[:4])

    def planned(config, loss):
        preference = get_preference(loss)
        return train_program(config.model, config.train, config.data, mesh, preference)

    simpo, dpo = planned(plain, "simpo"), planned(plain, "dpo")
    assert simpo.waiting_bytes == {}
    assert dpo.waiting_bytes == {REFERENCE: dpo.argument_bytes["parameters"]}
    rows = plain.data.batch_size // 4
    more = dpo.argument_bytes["batch"] - simpo.argument_bytes["batch"]
    assert more == 4 * rows * plain.data.seq_len
    assert planned(lora, "dpo").waiting_bytes == {}
    dpo.jitted.lower(*dpo.arguments)


def test_adapters_have_moments_and_their_base_has_none():
    """And the reference that waits while a policy samples is the base itself."""
    rl = ("reinforce.algorithm=grpo", "reinforce.kl_weight=0.01", "train.stage=dense")
    plain, lora = (make_config(*SMALL, *rl, f"train.lora={rank}") for rank in (0, 2))
    mesh = make_mesh(plain.mesh, jax.devices()[:4])
    sizes = [
        train_program(one.model, one.train, one.data, mesh).argument_bytes for one in (plain, lora)
    ]
    assert sizes[0]["moments"] > 8 * sizes[1]["moments"] > 0
    assert sizes[0]["parameters"] < sizes[1]["parameters"] < 1.5 * sizes[0]["parameters"]
    waiting = [
        rollout_program(one.model, one.train, one.sampling, one.reinforce, mesh).waiting_bytes
        for one in (plain, lora)
    ]
    assert waiting[0][REFERENCE] == sizes[0]["parameters"] and REFERENCE not in waiting[1]
