"""launch.reinforce and launch.evaluate on a tiny model: the reference, no step without a signal,
problems that do not fit, evaluation in between, and what devices and microbatches may not change.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from checkpoints.training import Checkpoints
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment import setup
from experiment.schema import Config
from launch import evaluate, pretrain, reinforce
from model.sharding import make_mesh
from model.transformer import boxed_shapes
from rl import batches
from rl.learner import per_update
from rl.rewards import get_reward
from tests.launch.documented_metrics import JUDGED, check_documented
from tests.launch.test_training_commands import final_variables, stopped_at, tiny
from train.optimizer import make_optimizer
from train.state import abstract_state

pytestmark = pytest.mark.command

# Random bytes are never a right answer: rewards that some completions earn and some do not.
REWARDS = """
def length(text, problem):
    return len(text.encode()) % 3 / 2

def constant(text, problem):
    return 1.0
"""
DENSE = {
    "model__num_nextn_predict_layers": 0,
    "train__stage": "dense",
    "sampling__attention": "dense",
    "train__learning_rate": 1e-2,
}


@pytest.fixture(autouse=True)
def in_a_place_with_rewards(tmp_path, monkeypatch):
    """Files are named from the working directory, as a person does."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(REWARDS)
    get_reward.cache_clear()
    on_devices(1, monkeypatch)


def on_devices(count: int, monkeypatch) -> None:
    """Makes every run see so many devices. One compiles in half the time of eight."""
    devices = jax.devices()[:count]
    monkeypatch.setattr(setup, "make_mesh", lambda mesh, _=None: make_mesh(mesh, devices))


def run_of(*rewards: str, **changes: Any) -> Config:
    """A config with these rewards of own.py, or "answer"; `init_from` is no section's field."""
    weights = {f"own.py:{name}" if name != "answer" else name: 1.0 for name in rewards}
    init_from = changes.pop("init_from", "")
    config = tiny(**DENSE | {"reinforce__rewards": weights} | changes)
    return dataclasses.replace(config, init_from=init_from)


def lines(workdir: str, kind: str = "loss") -> list[dict]:
    written = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
    clocked = re.compile("time|step_time|tokens_per_s|timing_s/.+|perf/.+")
    return [
        {k: v for k, v in line.items() if not clocked.fullmatch(k)}
        for line in written
        if kind in line
    ]


GAP = "sampling/sampling_logp_difference"
KL = {"reinforce__algorithm": "grpo", "reinforce__kl_weight": 0.5}


@pytest.mark.parametrize("origin", ["", "run"])
def test_a_resumed_run_has_the_reference_of_its_first_start(origin, monkeypatch):
    """To the bit, though the run that it started from went on, and its checkpoint is gone."""
    if origin:
        start = tiny(train__steps=2, train__eval_batches=0, **DENSE)
        pretrain.run(start, Path("run"))
    config = run_of("length", init_from=origin, **KL)
    assert reinforce.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not reinforce.run(config, Path("parts"))
    record = json.loads(Path("parts/reference.json").read_text())
    source = {"source": "run/checkpoints/2", "step": 2} if origin else {"source": "", "step": 0}
    assert record == source
    if origin:
        longer = tiny(train__steps=4, train__eval_batches=0, train__max_to_keep=1, **DENSE)
        pretrain.run(longer, Path("run"))
        assert not Path("run/checkpoints/2").exists()
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    kl = [line["kl"] for line in lines("whole")]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-4, "the policy leaves its reference"


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_reference_again():
    pretrain.run(tiny(train__steps=1, train__eval_batches=0, **DENSE), Path("run"))
    config = run_of("length", init_from="run", train__steps=1, **KL)
    reinforce.run(config, Path("whole"))
    check_documented("whole", "reference", "kl in the loss")
    shutil.copytree("whole/reference", "killed/reference")
    shutil.copy("whole/reference.json", "killed/reference.json")
    pretrain.run(tiny(train__steps=2, train__eval_batches=0, **DENSE), Path("run"))
    reinforce.run(config, Path("killed"))
    chex.assert_trees_all_equal(
        final_variables(config, Path("killed")), final_variables(config, Path("whole"))
    )


def test_a_reference_that_is_gone_is_one_line(monkeypatch):
    config = run_of("length", **KL)
    stopped_at(1, monkeypatch)
    reinforce.run(config, Path("run"))
    shutil.rmtree("run/reference")
    with pytest.raises(UserError, match=r"run/reference: the parameters of the reference are gone"):
        reinforce.run(config, Path("run"))


def test_a_run_made_without_keeping_a_reference_gets_that_of_its_seed(monkeypatch):
    config = run_of("length", **KL)
    assert reinforce.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        reinforce.run(config, Path("old"))
    shutil.rmtree("old/reference")
    Path("old/reference.json").unlink()
    assert reinforce.run(config, Path("old"))
    for one, other in zip(lines("old"), lines("whole"), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-6)


def state_of(config: Config, workdir: str, step: int):
    """Returns the whole state of a checkpoint, on the host."""
    model = setup.with_vocab_size(config.model, load_tokenizer(Path(workdir, "tokenizer.json")))
    updates = config.reinforce.epochs * config.reinforce.minibatches
    optimizer = make_optimizer(per_update(config.train, updates), boxed_shapes(model)["params"])
    abstract = abstract_state(model, optimizer, make_mesh(config.mesh))
    with Checkpoints(Path(workdir, "checkpoints"), keep=9) as checkpoints:
        return jax.device_get(checkpoints.restore(abstract, step=step))


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_step_without_a_signal_changes_its_counters_alone(kl_weight):
    """Parameters, moments and router bias, to the bit, with the defaults of pretraining: decay,
    balance loss, bias speed, and with a divergence too.
    """
    changes = {"train__save_every": 1, "train__max_to_keep": 9, "reinforce__minibatches": 2}
    changes |= {"reinforce__kl_weight": kl_weight, "reinforce__algorithm": "grpo"}
    config = run_of("constant", train__steps=3, **changes)
    assert config.train.weight_decay and config.train.balance_weight
    assert config.train.router_bias_rate
    reinforce.run(config, Path("run"))
    first, last = (state_of(config, "run", step) for step in (1, 3))
    assert (first.step, last.step, last.skipped, last.skipped_in_row) == (2, 6, 6, 0)
    chex.assert_trees_all_equal(first.variables, last.variables)
    chex.assert_trees_all_equal(first.opt_state, last.opt_state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(last.opt_state)), "as at the start"
    paid = run_of("length", train__steps=1, **changes)
    reinforce.run(paid, Path("paid"))
    moved = state_of(paid, "paid", 1)
    assert moved.skipped == 0
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(moved.variables), jax.tree.leaves(last.variables), strict=True
        )
    )
    assert [line["frac_reward_zero_std"] for line in lines("run")] == [1, 1, 1]


def test_the_gap_is_measured_before_the_first_of_several_updates():
    """And the other metrics are means: the policy that several large steps have left is clipped."""
    changes = {"reinforce__minibatches": 4, "reinforce__epochs": 2, "train__warmup_steps": 0}
    config = run_of("length", train__steps=1, **changes | {"train__learning_rate": 0.3})
    reinforce.run(config, Path("run"))
    (line,) = lines("run")
    assert line[f"{GAP}/max"] < 1e-4 and line[f"{GAP}/mean"] < 1e-5
    assert 0 < line["clip_ratio/region_mean"] < 1 and line["ppo_kl"] > 1e-3


def test_scoring_is_cut_and_packed_as_the_step_is(monkeypatch):
    """With old log-probs of the trainer and a reference; rounding alone may differ."""
    counts, pack = [], batches.packed_rows

    def counted(*args):
        counts.append(len(pack(*args)))
        return pack(*args)

    monkeypatch.setattr(batches, "packed_rows", counted)
    shared = KL | {"reinforce__old_logprobs": "trainer", "train__steps": 2}
    shared |= {"sampling__max_prompt_tokens": 320, "train__balance_weight": 0.0}
    reinforce.run(run_of("length", **shared), Path("one"))
    assert not counts
    cut = {"train__microbatches": 4, "reinforce__packing": True}
    reinforce.run(run_of("length", **shared, **cut), Path("cut"))
    assert counts == [4, 4], "rows, of 16 completions"
    for whole, cut in zip(lines("one"), lines("cut"), strict=True):
        assert cut["kl"] == pytest.approx(whole["kl"], rel=1e-3, abs=1e-6)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        assert cut["reward"] == whole["reward"] and cut[f"{GAP}/max"] < 1e-4


def test_a_prompt_that_does_not_fit_is_said_before_the_first_step_and_may_be_mended():
    """Raised or filtered, in the same workdir."""
    config = run_of("length", train__steps=1, sampling__max_prompt_tokens=70)
    message = r"sampling.max_prompt_tokens = 70: \d,\d+ of 4,096 prompts for train are longer, the "
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            reinforce.run(config, Path("run"))
    longest = int(re.findall(r"has (\d+) tokens", str(caught.value))[0])
    assert not Path("run/config.json").exists() and not Path("run/metrics.jsonl").exists()
    fits = run_of("length", train__steps=1, sampling__max_prompt_tokens=longest)
    assert reinforce.run(fits, Path("run"))
    kept = {"sampling__max_prompt_tokens": 70, "sampling__filter_overlong_prompts": True}
    assert reinforce.run(run_of("length", train__steps=2, **kept), Path("run"))
    assert [line["step"] for line in lines("run")] == [1, 2]


def test_evaluation_says_at_once_which_prompts_do_not_fit(capsys):
    changes = {"evaluate__problems": 16, "evaluate__samples": 2, "evaluate__infill_documents": 0}
    config = run_of("length", train__steps=1, **changes)
    reinforce.run(config, Path("run"))
    short = run_of("length", sampling__max_prompt_tokens=70, **changes)
    with pytest.raises(UserError, match=r"\d+ of 16 prompts for validation are longer"):
        evaluate.run(short, Path("run"))
    filtering = dataclasses.replace(short.sampling, filter_overlong_prompts=True)
    result = evaluate.run(dataclasses.replace(short, sampling=filtering), Path("run"))
    assert 0 < result["left_out"] == 16 - result["problems"] < 16
    assert f"{result['left_out']} problems left out" in capsys.readouterr().out


def test_a_reward_that_fails_costs_no_step():
    """It is named with the problem, and the steps before it are saved."""
    Path("own.py").write_text("""
steps = []
def failing(text, problem):
    steps.append(1)
    return len(text) % 2 if len(steps) <= 2 * 16 else 1 / 0
""")
    with pytest.raises(
        UserError, match=r"own.py:5: ZeroDivisionError: .*failing.*; step 2 is saved"
    ):
        reinforce.run(run_of("failing"), Path("run"))
    with Checkpoints(Path("run/checkpoints"), keep=1) as checkpoints:
        assert checkpoints.latest() == 2


def test_held_out_problems_are_evaluated_in_between():
    changes = {"evaluate__problems": 8, "evaluate__samples": 2, "evaluate__reward": "own.py:length"}
    config = run_of("length", train__steps=5, train__eval_every=2, **changes)
    reinforce.run(config, Path("run"))
    check_documented("run", "evaluation", JUDGED)
    found = lines("run", "validation_pass_at_1")
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        assert 0 <= line["validation_pass_at_1"] <= line["validation_pass_at_2"] <= 1
        assert line["validation_pass_at_1"] < line["validation_rewards/length/mean"] < 1
    assert not lines(str(Path("run")), "validation_lm")


def samples(workdir: str) -> list[dict]:
    text = Path(workdir, "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_one_device_and_eight_draw_the_same_samples(monkeypatch):
    """Thirteen problems, which fill up no batch alike; nothing counts what fills it."""
    changes = {"evaluate__problems": 13, "evaluate__samples": 3, "evaluate__infill_documents": 0}
    reinforce.run(run_of("length", train__steps=1, **changes), Path("run"))
    results = []
    for name, devices in (("one", 1), ("eight", 8)):
        on_devices(devices, monkeypatch)
        config = run_of("length", "answer", init_from="run", **changes)
        results.append(evaluate.run(config, Path(name)))
    assert samples("one") == samples("eight") and len(samples("one")) == 39
    one, eight = results
    assert one["completion_length"] == eight["completion_length"]
    assert one["truncated"] == eight["truncated"]
    mean = np.mean([sample["rewards"]["own.py:length"] for sample in samples("one")])
    assert one["length_reward"] == pytest.approx(mean) and 0 < mean < 1


def test_a_fraction_is_a_success_where_the_threshold_says_so():
    changes = {"evaluate__problems": 8, "evaluate__samples": 4, "evaluate__infill_documents": 0}
    changes |= {"evaluate__reward": "own.py:length"}
    reinforce.run(run_of("length", train__steps=1, **changes), Path("run"))
    rates = {}
    for success in (0.5, 1.0):
        config = run_of("length", evaluate__success=success, **changes)
        result = evaluate.run(config, Path("run"))
        assert result["success"] == {"reward": "own.py:length", "least": success}
        earned = [sample["reward"] for sample in samples("run")]
        rates[success] = result["pass_at_k"][0]["mean"]
        assert rates[success] == pytest.approx(np.mean(np.asarray(earned) >= success))
        assert result["length_reward"] == pytest.approx(np.mean(earned))
    assert rates[1.0] < result["length_reward"] < rates[0.5]


def test_policies_are_compared_over_what_was_drawn_from(capsys):
    """Before a run's first update policy and reference are what sampled, to rounding of float32;
    held-out problems are evaluated by the same programs.
    """
    changes = {"sampling__top_p": 0.7, "sampling__top_k": 50, "train__steps": 1}
    changes |= {"train__eval_every": 1, "evaluate__problems": 4, "evaluate__samples": 2}
    assert reinforce.run(run_of("length", **changes, **KL), Path("run"))
    (line,) = lines("run", "ratio/mean")
    assert line["ratio/mean"] == pytest.approx(1, abs=1e-5) and abs(line["kl"]) < 1e-6
    out = capsys.readouterr().out
    assert re.search(r"sampling +\d+ slots of .* MiB, [\d,]+ B a token;", out)
    assert re.search(r"records +at most \d+ B a token on the host \(routes \d+, support \d+\)", out)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"sampling__top_p": 0.7, "sampling__record_gib": 1e-9},
            "sampling.record_gib = 1e-09: the records of 16 completions of",
        ),
        (
            {"sampling__top_p": 0.9, "reinforce__keep_sampling_mask": False},
            "sampling.top_p = 0.9: without reinforce.keep_sampling_mask the loss compares whole",
        ),
        (
            {"sampling__top_k": 20, "reinforce__keep_sampling_mask": False},
            "sampling.top_k = 20: without reinforce.keep_sampling_mask the loss compares whole",
        ),
        (
            {"train__eval_every": 1, "evaluate__problems": 0},
            "train.eval_every = 1: evaluates held-out problems, and evaluate.problems = 0",
        ),
        (
            {"reinforce__minibatches": 4},
            "minibatches / train.microbatches = 4: 4 rows at a time do not divide over 8 devices",
        ),
        (
            {"reinforce__prompts_per_step": 12, "reinforce__group_size": 2},
            "reinforce.prompts_per_step = 12: 12 rows at a time do not divide over 8 devices",
        ),
        ({"reinforce__rewards": {"own.py:nothing": 1.0}}, "own.py: defines no 'nothing'"),
        (
            {"reinforce__packing": True, "train__balance_weight": 0.1},
            "train.balance_weight = 0.1: the balance loss takes a row for a sequence",
        ),
        ({"evaluate__reward": "other.py:x", "train__eval_every": 1}, "other.py: no such file"),
    ],
)
def test_what_cannot_be_reinforced_is_refused_before_anything_runs(changes, message, monkeypatch):
    on_devices(8, monkeypatch)
    with pytest.raises(UserError, match=message):
        reinforce.run(run_of("length", **changes), Path("run"))
    assert not Path("run/config.json").exists() and not Path("run/tokenizer.json").exists()


def test_the_batch_of_text_does_not_matter_to_reinforcement(monkeypatch):
    """Eight devices and two microbatches, and a data.batch_size that neither divides."""
    on_devices(8, monkeypatch)
    changes = {"data__batch_size": 7, "train__microbatches": 2, "train__steps": 1}
    assert reinforce.run(run_of("length", **changes), Path("run"))
    changes |= {"evaluate__problems": 4, "evaluate__samples": 2, "evaluate__infill_documents": 0}
    assert evaluate.run(run_of("length", **changes), Path("run"))["problems"] == 4
