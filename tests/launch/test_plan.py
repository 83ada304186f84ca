"""launch.plan plans this process's devices, or a TPU topology's, and what a person can get wrong is
one line. The TPU part needs libtpu and no TPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from errors import UserError
from launch import plan
from model.mesh import MESH_AXES
from model.sharding import make_mesh
from plan import topology
from tests.plan.small_config import SMALL, as_flags, make_config, needs_libtpu

ROOT = Path(__file__).parents[2]


def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", "--config=configs/base.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.command
def test_plans_the_pretended_devices_of_this_process(tmp_path):
    path = tmp_path / "plan.json"
    done = command(*as_flags(*SMALL), "--pretend_devices=4", f"--json={path}")
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "rollout: " in done.stdout and "measured" not in done.stdout
    record = json.loads(path.read_text())
    assert record["mesh"] == dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "expert": 2}
    assert [plan["program"] for plan in record["plans"]] == ["train", "rollout"]
    train, rollout = record["plans"]
    assert train["bytes"]["moments"] > train["bytes"]["parameters"]
    assert train["bytes"]["batch"] == 4 * 8 * 64 * 4 // 4
    assert train["total_bytes"] == sum(train["bytes"].values())
    assert train["bytes"]["output"] < train["bytes"]["parameters"]  # donated
    assert rollout["bytes"]["parameters"] == train["bytes"]["parameters"]
    assert rollout["bytes"]["moments (waiting)"] == train["bytes"]["moments"]
    assert "all-gather" in train["traffic"]["collectives"]
    assert rollout["traffic"]["unknown_loops"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_reference_of_a_loss_over_pairs_waits():
    """And next-token prediction, which has none, is no row of the table of such losses."""
    for loss, waiting in (("next_token", set()), ("dpo", {"reference policy (waiting)"})):
        config = make_config(*SMALL, "train.stage=dense", f"finetune.loss={loss}")
        mesh = make_mesh(config.mesh, jax.devices()[:4])
        assert plan.program("train", config, config.model, mesh).waiting_bytes.keys() == waiting


def refused(*overrides, **flags) -> str:
    with pytest.raises(UserError) as error:
        plan.run(make_config(*overrides), **({"topology": "", "what": "train", "json": ""} | flags))
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


def test_json_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """It stands below a file. Nothing is compiled for it here."""
    monkeypatch.setitem(plan.PROGRAMS, "train", ())
    (tmp_path / "file").touch()
    path = tmp_path / "file/plan.json"
    assert refused(json=str(path)).startswith(f"{path}: cannot write")


@pytest.mark.command
@needs_libtpu
def test_plans_a_tpu_without_one(tmp_path):
    overrides = (
        *SMALL,
        "model.dtype=bfloat16",
        "model.moe.num_experts=2",
        "model.moe.num_experts_per_tok=2",
        "data.batch_size=4",
    )
    path = tmp_path / "plan.json"
    done = command(*as_flags(*overrides), "--topology=v5e:2x2", "--what=train", f"--json={path}")
    assert done.returncode == 0, done.stderr
    (train,) = json.loads(path.read_text())["plans"]
    assert "train: fits" in done.stdout and "static estimate" in done.stdout
    assert train["seconds"].keys() == {"compute", "hbm", "links"}
    # The experts' matmul is the TPU's, not that of the CPU that compiles.
    assert train["flops"]["grouped"] > 0
    assert train["traffic"]["collectives"] and train["traffic"]["unknown_loops"] == 0


@pytest.mark.command
@needs_libtpu
def test_what_does_not_fit_a_tpu_is_a_verdict():
    overrides = as_flags(*SMALL, "model.vocab_size=64000000", "data.batch_size=4")
    done = command(*overrides, "--topology=v5e:2x2", "--what=train")
    assert done.returncode == 0, done.stderr
    assert "train: does not fit, " in done.stdout and "GiB too much" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.command
@needs_libtpu
def test_a_topology_that_the_compiler_does_not_know_is_one_line():
    done = command("--topology=v5p:3x3x3")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "--topology=v5p:3x3x3" in done.stderr
