"""Runs of algorithms that ask more of the loop: a critic, greedy completions, a reference that is
refreshed, an optimizer that begins anew, a teacher; stopped and resumed to the bit.
"""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from checkpoints.restore import restore_parameters
from checkpoints.training import Checkpoints
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment import setup
from experiment.schema import Config
from launch import algorithms, pretrain, reinforce
from model.sharding import make_mesh
from tests.launch.documented_metrics import JUDGED, check_documented
from tests.launch.test_reinforce import DENSE, in_a_place_with_rewards, lines, run_of  # noqa: F401
from tests.launch.test_training_commands import final_variables, stopped_at, tiny
from train.restore import load_variables

pytestmark = pytest.mark.command


def whole_and_in_parts(config: Config, monkeypatch, at: int = 2) -> list[dict]:
    """Runs a config at once, and stopped after a step and resumed; returns its metrics."""
    assert reinforce.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(at, patch)
        assert not reinforce.run(config, Path("parts"))
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    chex.assert_trees_all_equal(everything("parts"), everything("whole"))
    return lines("whole")


def everything(workdir: str):
    """All arrays of the newest checkpoint, moments and critic too."""
    with Checkpoints(Path(workdir, "checkpoints"), keep=9) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        records = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                checkpoints._manager.item_metadata(step).state.tree,
            )
        )
    return jax.device_get(records)


def shape_of(config: Config, workdir: str):
    """The model of a run with its vocabulary, and a mesh."""
    tokenizer = load_tokenizer(Path(workdir, "tokenizer.json"))
    return setup.with_vocab_size(config.model, tokenizer), make_mesh(config.mesh, jax.devices()[:1])


PPO = {
    "reinforce__algorithm": "ppo?lam=0.9",
    "reinforce__minibatches": 2,
    "reinforce__critic_warmup_steps": 1,
    "reinforce__critic_learning_rate": 0.02,
}


def test_ppo_with_its_critic(monkeypatch, tmp_path):
    """The critic learns while the policy waits, and beside it; an export has nothing of it."""
    config = run_of("length", train__steps=4, **PPO)
    found = whole_and_in_parts(config, monkeypatch)
    check_documented("whole", "critic")
    assert [line["skipped"] for line in found] == [2, 2, 2, 2], "the first step's, of the policy"
    assert all(line["critic/grad_norm"] > 0 for line in found)
    assert all(line["critic/learning_rate"] == pytest.approx(0.02, rel=0.9) for line in found)
    assert found[-1]["critic/vf_loss"] < found[0]["critic/vf_loss"]
    means = [abs(line["critic/vpred_mean"]) for line in found]
    assert means[0] < means[-1], "it begins at 0"
    state = everything("whole")
    assert int(state["step"]) == int(state["critic"]["step"]) == 8
    trunk, policy = state["critic"]["params"], state["params"]
    assert trunk.keys() == (policy.keys() - {"head"}) | {"value"}
    assert load_variables(*shape_of(config, "whole"), "whole").keys() == {"params", "router"}
    # Another run's critic, and none where there is none.
    again = run_of("length", train__steps=1, **PPO | {"reinforce__critic_from": "whole"})
    assert reinforce.run(again, Path("again"))
    (line,) = lines("again")
    assert abs(line["critic/vpred_mean"]) > means[0]
    without = run_of("length", train__steps=1, **DENSE | {"reinforce__algorithm": "grpo"})
    assert reinforce.run(without, Path("without"))
    with pytest.raises(UserError, match=r"reinforce.critic_from = 'without': .* is not there"):
        changes = PPO | {"reinforce__critic_from": "without"}
        reinforce.run(run_of("length", **changes), Path("none"))


ALL_AT_ONCE = {
    "reinforce__algorithm": "remax?selection=kl_cov&cov_share=0.2&surrogate=covariance_penalty"
    "&kl=0.1&kl_estimator=k1&kl_in=reward&entropy=0.01",
    "reinforce__minibatches": 2,
    "reinforce__reference_every": 2,
    "reinforce__reset_optimizer_every": 1,
    "reinforce__group_size": 1,
    "reinforce__prompts_per_step": 16,
}


def test_greedy_baselines_a_selection_and_a_reference_that_moves(monkeypatch):
    """One completion of a prompt: the greedy one is what it is compared with."""
    config = run_of("length", train__steps=4, **ALL_AT_ONCE)
    found = whole_and_in_parts(config, monkeypatch, at=3)
    check_documented("whole", "greedy", "entropy", "reference")
    assert all(line["grad_norm"] > 0 and np.isfinite(line["entropy_bonus"]) for line in found)
    kept = sorted(int(path.name) for path in Path("whole/reference").iterdir())
    assert kept == [0, 2, 4]
    policy = final_variables(config, Path("whole"))
    wanted = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), policy[name])
              for name in policy}  # fmt: skip
    newest = restore_parameters(Path("whole/reference/4"), wanted)
    chex.assert_trees_all_equal(jax.device_get(newest), policy)
    counts = [
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(everything("whole")["opt_state"])
        if "count" in jax.tree_util.keystr(path)
    ]
    # Adam's count begins anew each step of two updates; the schedule's has counted all eight.
    assert sorted(set(counts)) == [2, 8]


def test_a_run_that_died_after_a_new_reference_goes_on_from_the_older(monkeypatch):
    """The reference of its last checkpoint, not the newest that was kept."""
    changes = {"reinforce__reference_every": 1, "train__save_every": 2, "train__steps": 4}
    changes |= {"reinforce__algorithm": "grpo?kl=0.5"}
    config = run_of("length", **changes)
    assert reinforce.run(config, Path("whole"))

    class Killed(BaseException):
        """Nothing saves a run that is killed."""

    def killed(self, step, *args):
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("rl.traces.Traces.write", killed)
        with pytest.raises(Killed):
            reinforce.run(config, Path("parts"))
    assert Path("parts/reference/3").exists() and not Path("parts/checkpoints/3").exists()
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")


def test_a_student_comes_nearer_to_its_teacher():
    """On-policy distillation, whatever the reward; the teacher is another run."""
    pretrain.run(tiny(train__steps=20, train__eval_batches=0, **DENSE), Path("teacher"))
    # A divergence of no weight, for its metric.
    changes = {"reinforce__algorithm": "opd?kl=1e-9", "reinforce__reference": "teacher"}
    config = run_of("constant", train__steps=12, **changes | {"train__learning_rate": 3e-2})
    assert reinforce.run(config, Path("run"))
    found = lines("run")
    assert found[-1]["kl"] < 0.8 * found[0]["kl"]
    assert all(line["frac_reward_zero_std"] == 1 and line["skipped"] == 0 for line in found)
    record = json.loads(Path("run/reference.json").read_text())
    assert record == {"source": "teacher/checkpoints/20", "step": 20}


def test_entropies_and_corrections_of_old_log_probs():
    spec = "gtpo_entropy?success=0.5&correction=token_truncate&correction_high=1.5&off_policy=0.5"
    config = run_of("length", train__steps=2, reinforce__algorithm=spec, reinforce__minibatches=2)
    assert reinforce.run(config, Path("run"))
    check_documented("run", "scored")
    assert all(line["grad_norm"] > 0 for line in lines("run"))


def test_sampling_on_and_an_order_by_pass_rates(monkeypatch):
    """ScaleRL with dynamic sampling by the policy of a step before, stopped and resumed: with what
    was tried and solved, and what waits to be learnt from.
    """
    changes = {"reinforce__algorithm": "scale_rl?zero_variance=replaced&retire_at=0.6"}
    changes |= {"reinforce__order": "unsolved", "reinforce__resample_limit": 3}
    changes |= {"reinforce__lag": 1, "reinforce__most_stale": 1}
    changes |= {"evaluate__reward": "own.py:length", "evaluate__success": 0.5}
    found = whole_and_in_parts(run_of("length", train__steps=4, **changes), monkeypatch)
    check_documented("whole", "zero_variance", "order", "lag", JUDGED)
    assert any(line["left_out"] > 0 for line in found)
    assert all(line["groups"] == 8 for line in found)
    assert [line["sampling/staleness/share_1"] for line in found] == [0, 1, 1, 1]
    assert found[0]["ratio/mean"] == pytest.approx(1, abs=1e-5) != found[-1]["ratio/mean"]
    assert found[-1]["curriculum/tried"] > 8 and found[-1]["curriculum/retired"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithm": "opd"}, "reinforce.reference = '': must name the teacher of 'opd'"),
        ({"algorithm": "dapo", "reference": "run"}, "'dapo' compares with no reference"),
        ({"algorithm": "dapo", "critic_from": "run"}, "'dapo' has no critic; 'ppo' has one"),
        ({"algorithm": "grpo", "group_size": 1}, "must be at least 2: 'grpo' compares"),
        ({"algorithm": "grpo?low=-1"}, "the bounds of the ratio"),
        ({"algorithm": "opd", "reference": "r", "reference_every": 2}, "must be 0 where"),
        ({"value_clip": -0.1}, "reinforce.value_clip = -0.1: must not be negative"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        run_of("length", **{f"reinforce__{name}": value for name, value in changes.items()})


def test_the_table_is_printed(capsys):
    algorithms.run(row="", json=False)
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("grpo", "ppo", "gtpo_conflict", "scale_rl"))
    assert all(len(line) < 80 for line in out.splitlines())
    algorithms.run(row="", json=True)
    table = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert table["ppo"]["needs"].keys() == {"values"} and table["gspo"]["options"]["low"] == 3e-4
    assert table["deepseek_v32"]["loop"]["keep_routing"] is True
    Path("my_rows.py").write_text("from rl.algorithms.row import Row\nmine = Row('p', 'f')\n")
    algorithms.run(row="my_rows.py:mine", json=False)
    assert "my_rows.py:mine: p" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'dapo'"):
        algorithms.run(row="dapoo", json=False)


def test_a_row_of_a_file_is_not_run_before_it_is_needed():
    """A config that names one may be read where the file is not."""
    config = run_of("length", reinforce__algorithm="elsewhere.py:mine")
    assert dataclasses.replace(config.reinforce).algorithm == "elsewhere.py:mine"
    with pytest.raises(UserError, match=r"elsewhere\.py: no such file"):
        reinforce.run(config, Path("run"))
