"""A plan counts what a program does: its loops as often as they run, its collectives in bytes, its
memory by kind. The TPU part needs libtpu and no TPU.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from errors import UserError
from experiment.config_files import with_overrides
from experiment.schema import parse
from kernels.grouped_matmul import Tiles, megablox
from launch import plan
from model.experts import table
from plan import flops, hlo, topology

ROOT = Path(__file__).parents[2]
SMALL = (
    *(
        "model.vocab_size=300",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.intermediate_size=48",
        "model.num_nextn_predict_layers=0",
        "model.indexer.n_heads=0",
    ),
    *(
        "model.mla.num_attention_heads=2",
        "model.mla.q_lora_rank=16",
        "model.mla.kv_lora_rank=16",
        "model.moe.num_experts=4",
        "model.moe.intermediate_size=16",
    ),
    *(
        "data.seq_len=64",
        "reinforce.prompts_per_step=4",
        "reinforce.group_size=2",
        "sampling.max_prompt_tokens=16",
        "sampling.max_new_tokens=8",
        "sampling.attention=dense",
    ),
    *("mesh.fsdp=2", "mesh.expert=2"),
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed here: .venv-compile has it",
)


def config(*words):
    return parse(with_overrides(base.get_config(), [f"--config.{word}" for word in words]))


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


# ---- plan/hlo.py: reading a schedule

SCHEDULE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (in: f32[1024]) -> f32[256] {
  %in = f32[1024]{0:T(1024)} parameter(0)
  %all-reduce.9 = f32[1024]{0:T(1024)} all-reduce(%in), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice.9 = f32[256]{0} slice(%all-reduce.9), slice={[0:256]}
}

%sliced (stack: f32[7,1024], at: s32[]) -> f32[1024] {
  %stack = f32[7,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %piece = f32[1,1024]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%piece)
}

%condition (state: (s32[], f32[1024], f32[7,1024])) -> pred[] {
  %state.1 = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (state: (s32[], f32[1024], f32[7,1024])) -> (s32[], f32[1024], f32[7,1024]) {
  %state.2 = (s32[], f32[1024]{0}, /*index=2*/f32[7,1024]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %stack.2 = f32[7,1024]{1,0} get-tuple-element(%state.2), index=2
  %piece.2 = f32[1024]{0} fusion(%stack.2, %i.2), kind=kLoop, calls=%sliced
  %near = f32[1024]{0:T(1024)S(1)} copy(%piece.2)
  %part = f32[256]{0:T(256)S(1)} fusion(%near), kind=kCustom, calls=%all-reduce-scatter.1
  %whole = bf16[2048]{0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %next = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) tuple(%i.2, %piece.2, %stack.2)
}

ENTRY %main (x: f32[1024], stack: f32[7,1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %stack.3 = f32[7,1024]{1,0} parameter(1)
  %start = s32[] constant(0)
  %first = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) tuple(%start, %x, %stack.3)
  %loop = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) while(%first), condition=%condition, body=%body
  %out = f32[1024]{0} get-tuple-element(%loop), index=1
  %swap.1 = (f32[1024]{0:S(1)}, f32[1024]{0:S(1)}) collective-permute-start(%out), source_target_pairs={{0,1},{1,0}}
  ROOT %swap.2 = f32[1024]{0} collective-permute-done(%swap.1)
}
"""


def test_collectives_count_as_often_as_they_run():
    found = hlo.traffic(SCHEDULE)
    assert found.collectives == {
        "all-gather": (
            7,
            7 * 4096 * 3 / 4,
        ),  # of its 4096 bytes three quarters come from the three others
        "reduce-scatter": (7, 7 * 4096 * 3 / 4),
        "collective-permute": (1, 4096),
    }
    assert found.unknown_loops == 0


def test_hbm_traffic_counts_slices_and_no_vector_memory():
    # A round reads and writes the 4096 bytes of its slice, and reads them again for the copy into
    # vector memory; the last line's result leaves it.
    copied = 4096
    scalars = 4 * 7  # the fusion's index
    assert hlo.traffic(SCHEDULE).hbm_bytes == 7 * (2 * 4096 + copied) + scalars


def test_a_loop_of_unknown_length_is_said_to_be():
    found = hlo.traffic(SCHEDULE.replace("direction=LT", "direction=NE"))
    assert found.unknown_loops == 1 and found.collectives["all-gather"][0] == 1
    told = SCHEDULE.replace("direction=LT", "direction=NE").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert hlo.traffic(told).collectives["all-gather"][0] == 5


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=2,'b'=8] {'b':(1)4}",
    ],
)
def test_group_size(groups):
    assert hlo.group_size(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}") == 4


def test_a_compiled_program_agrees():
    """Five rounds of gathering a [64, 64] float32 that eight devices hold an eighth of each."""
    mesh = Mesh(jax.devices(), ("x",))

    @jax.jit
    def gather_and_multiply(x, stack):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jax.lax.scan(body, x, stack)[0]

    rows = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    stack = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x"))
    )
    found = hlo.traffic(gather_and_multiply.lower(rows, stack).compile().as_text())
    count, received = found.collectives["all-gather"]
    assert received == 5 * 64 * 64 * 4 * 7 / 8 and count in (
        1,
        5,
    )  # the compiler may gather all five before the loop
    assert found.unknown_loops == 0


# ---- plan/flops.py


def test_flops_count_loops_recomputation_and_devices():
    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    once = 2 * 4 * 8 * 8

    def layers(w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    def recomputed(w):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0])

    assert flops.program_flops(jax.make_jaxpr(layers)(w)) == (3 * once, 0)
    assert flops.program_flops(jax.make_jaxpr(jax.grad(layers))(w)).dense == 9 * once
    assert flops.program_flops(jax.make_jaxpr(jax.grad(recomputed))(w)).dense == 12 * once
    loop = jax.make_jaxpr(
        lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w[0], x)
    )(x)
    assert flops.program_flops(loop, rounds=5).dense == 5 * once
    mesh = Mesh(jax.devices(), ("x",))
    each = jax.shard_map(
        lambda x: x @ w[0], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    assert flops.program_flops(jax.make_jaxpr(each)(x)).dense == 8 * once


def test_flops_of_grouped_matmuls():
    """Forward, to x and to w: rows x D x F x 2 each, whatever the tiles; and of those of the
    experts, a gate, an up and a down projection.
    """
    x, w, sizes = jnp.ones((256, 8)), jnp.ones((3, 8, 4)), jnp.array([4, 2, 6])
    once = 2 * 256 * 8 * 4
    loss = jax.make_jaxpr(
        jax.grad(lambda x, w: jnp.sum(megablox(x, w, sizes, Tiles(128)) ** 2), argnums=(0, 1))
    )(x, w)
    assert flops.program_flops(loss) == (0, 3 * once)

    chosen, gates, down = jnp.zeros((64, 4), int), jnp.ones((64, 4)), jnp.ones((3, 4, 8))
    mixture = table.pick("megablox", "tpu", 256, 3)
    slots = 128 * (
        (256 + 3 * 127) // 128
    )  # each of the three groups may leave its last tile all but empty
    loss = jax.make_jaxpr(
        jax.grad(
            lambda x, w, down: jnp.sum(mixture(x, chosen, gates, w, w, down) ** 2),
            argnums=(0, 1, 2),
        )
    )(x[:64], w, down)
    assert flops.program_flops(loss) == (0, 3 * 3 * 2 * slots * 8 * 4)


def test_flops_of_a_kernel_that_states_no_cost():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    double = pl.pallas_call(kernel, jax.ShapeDtypeStruct((5, 8, 8), jnp.float32), grid=(5,), in_specs=[pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0))],
                            out_specs=pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0)))  # fmt: skip
    assert flops.program_flops(jax.make_jaxpr(double)(jnp.ones((5, 8, 8)))) == (
        5 * 2 * 8 * 8 * 8,
        0,
    )


@pytest.mark.parametrize("stage, mtp_weight", [("dense", 0.3), ("sparse", 0.3), ("dense", 0.0)])
def test_formula_and_program_agree_where_nothing_is_wasted(stage, mtp_weight):
    """Without experts, recomputed layers and a long context, a step does what the formula says, and
    the masked half of attention, which is small here. The indexer's inputs take no gradient: a
    third of its few parameters' share is less than the formula's.
    """
    small = (
        "model.num_hidden_layers=2",
        "model.first_k_dense_replace=2",
        "model.num_nextn_predict_layers=1",
        "model.vocab_size=512",
        "data.seq_len=16",
        "data.batch_size=2",
    )
    c = config(*small, f"train.stage={stage}", f"train.mtp_weight={mtp_weight}")
    mesh = plan.make_mesh(c.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = plan.train_program(c, c.model, mesh)
        counted = flops.program_flops(program.jitted.trace(*program.arguments).jaxpr)
    assert 0.95 < program.formula / counted.dense <= 1.02 and counted.grouped == 0


def test_attended_keys():
    assert flops.attended(range(4), 99) == 1 + 2 + 3 + 4
    assert flops.attended(range(2, 6), 4) == 3 + 4 + 4 + 4


# ---- launch/plan.py


def test_plans_the_pretended_devices_of_this_process(tmp_path):
    words = [f"--config.{word}" for word in SMALL]
    done = command(
        "--config=configs/base.py",
        *words,
        "--pretend_devices=4",
        f"--json={tmp_path / 'plan.json'}",
    )
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "rollout: " in done.stdout and "measured" not in done.stdout
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1} and [
        p["program"] for p in record["plans"]
    ] == ["train", "rollout"]
    train, rollout = record["plans"]
    assert (
        train["bytes"]["moments"] > train["bytes"]["parameters"]
        and train["bytes"]["batch"] == 4 * 8 * 64 * 4 // 4
    )
    assert (
        train["total_bytes"] == sum(train["bytes"].values())
        and train["bytes"]["output"] < train["bytes"]["parameters"]
    )  # donated
    assert (
        rollout["bytes"]["parameters"] == train["bytes"]["parameters"]
        and rollout["bytes"]["moments (waiting)"] == train["bytes"]["moments"]
    )
    assert (
        "all-gather" in train["traffic"]["collectives"] and rollout["traffic"]["unknown_loops"] == 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_parameters_shrink_with_the_mesh():
    def parameters(*words):
        c = config(*SMALL, *words)
        mesh = plan.make_mesh(c.mesh)
        return plan.train_program(c, c.model, mesh).held["parameters"]

    whole = parameters("mesh.fsdp=1", "mesh.expert=1")
    assert (
        parameters("mesh.fsdp=1", "mesh.expert=2") < whole
        and whole / 4 < parameters("mesh.fsdp=4", "mesh.expert=1") < whole / 2
    )


def refused(*words, **flags) -> str:
    with pytest.raises(UserError) as error:
        plan.run(config(*words), **{"topology": "", "what": "train", "json": ""} | flags)
    assert "\n" not in str(error.value).strip()
    return str(error.value)


def test_what_a_person_can_get_wrong_is_one_line():
    assert "v5e, v5p" in refused(topology="v9:2x2") and "v5p:4x4x4" in refused(topology="v5p")
    assert refused("mesh.fsdp=3").startswith("mesh data=-1,fsdp=3")
    assert refused("data.batch_size=4").startswith(
        "data.batch_size / train.microbatches = 4: does not divide over the 8 devices"
    )
    assert refused("reinforce.prompts_per_step=4", what="rollout").startswith(
        "reinforce.prompts_per_step = 4"
    )
    assert refused("tokenizer.kind=bytes").endswith("give --config.model.vocab_size=N")


def test_without_the_tpu_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert "make .venv-compile/installed" in refused(topology="v5p:2x2x1")


def test_vocabulary_is_the_config_s():
    assert plan.sized(config("tokenizer.vocab_size=777")).vocab_size == 777
    assert plan.sized(config("tokenizer.kind=bytes", "model.vocab_size=300")).vocab_size == 300


def test_json_that_cannot_be_written_is_one_line(tmp_path):
    c = config()
    with pytest.raises(UserError, match="cannot be written"):
        plan.write(tmp_path / "missing" / "plan.json", c, "", plan.make_mesh(c.mesh), [])


def test_out_of_memory_has_numbers():
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.50T) exceeds available HBM (95.50G)."
    assert plan.exhausted(said, held=7, room=1) == (7 + 3 * 2**39, 191 * 2**29)
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert plan.exhausted(said, held=7, room=1) == (41 * 2**29, 63 * 2**28)
    assert plan.exhausted("RESOURCE_EXHAUSTED: vmem", held=7, room=1) == (0, 1)


@pytest.mark.parametrize("path", ["configs/deepseek_v32.py", "configs/moe_16b.py"])
def test_the_large_configs_have_their_model_s_size(path):
    from experiment.config_files import get_config
    from train.state import count_parameters

    total, active = count_parameters(
        dataclasses.replace(plan.sized(parse(get_config(path))), num_nextn_predict_layers=0)
    )
    # DeepSeek-V3: 671B and 37B (arXiv 2412.19437, abstract), here with the embedding, and 0.85B of
    # indexer. DeepSeek-V2-Lite: 15.7B and 2.4B (arXiv 2405.04434, appendix B), here with both
    # embeddings, the gate and the indexer.
    expected = {
        "configs/deepseek_v32.py": (671.9e9, 38.4e9),
        "configs/moe_16b.py": (15.9e9, 2.84e9),
    }[path]
    assert math.isclose(total, expected[0], rel_tol=5e-3) and math.isclose(
        active, expected[1], rel_tol=2e-2
    )


@needs_libtpu
def test_plans_a_tpu_without_one(tmp_path):
    words = [
        f"--config.{word}"
        for word in (
            *SMALL,
            "model.dtype=bfloat16",
            "model.moe.num_experts=2",
            "model.moe.num_experts_per_tok=2",
            "data.batch_size=4",
        )
    ]
    done = command(
        "--config=configs/base.py",
        *words,
        "--topology=v5e:2x2",
        "--what=train",
        f"--json={tmp_path / 'plan.json'}",
    )
    assert done.returncode == 0, done.stderr
    (train,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert (
        "train: fits" in done.stdout
        and "static estimate" in done.stdout
        and train["seconds"].keys() == {"compute", "hbm", "links"}
    )
    assert (
        train["flops"]["grouped"] > 0
    )  # the experts' matmul is the TPU's, not that of the CPU that compiles
    assert train["traffic"]["collectives"] and train["traffic"]["unknown_loops"] == 0


@needs_libtpu
def test_plans_tokamax_s_grouped_matmul(tmp_path):
    """Nine products, as megablox's, and three that are computed anew only to be thrown away: its
    backward pass names its result among what it needs.
    """
    pytest.importorskip(
        "tokamax", reason="optional: pip install tokamax, with Python 3.12 or newer"
    )

    def grouped(implementation: str) -> float:
        sizes = (
            "model.hidden_size=128",
            "model.moe.intermediate_size=128",
            "model.moe.num_experts=2",
            "model.moe.num_experts_per_tok=2",
            "model.dtype=bfloat16",
            "data.batch_size=4",
        )
        c = config(*SMALL, *sizes, f"model.expert_matmul={implementation}")
        mesh = plan.make_mesh(c.mesh, topology.topology_devices("v5e:2x2"))
        with jax.set_mesh(mesh), plan.for_absent_devices(c.model):
            program = plan.train_program(c, c.model, mesh)
            return flops.program_flops(program.jitted.trace(*program.arguments).jaxpr).grouped

    assert grouped("tokamax") == grouped("megablox") * 12 / 9


@needs_libtpu
def test_what_does_not_fit_a_tpu_is_a_verdict(tmp_path):
    words = [
        f"--config.{word}" for word in (*SMALL, "model.vocab_size=64000000", "data.batch_size=4")
    ]
    done = command("--config=configs/base.py", *words, "--topology=v5e:2x2", "--what=train")
    assert done.returncode == 0, done.stderr
    assert (
        "train: does not fit, " in done.stdout
        and "GiB too much" in done.stdout
        and "Traceback" not in done.stderr
    )


@needs_libtpu
def test_a_topology_that_the_compiler_does_not_know_is_one_line():
    done = command("--config=configs/base.py", "--topology=v5p:3x3x3")
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and "--topology=v5p:3x3x3" in done.stderr
    )
