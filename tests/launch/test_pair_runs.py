"""Runs on pairs: stopped and resumed, by adapters, evaluated and sampled; and what is refused."""

import dataclasses
import json
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
from launch import evaluate, finetune, pretrain
from model.sharding import make_mesh
from tests.launch.documented_metrics import pair_metrics, written_by
from tests.launch.test_training_commands import (
    NO_MTP,
    final_variables,
    losses,
    stopped_at,
    tiny,
)
from train.restore import load_variables

pytestmark = pytest.mark.command

SOURCE = "jsonl:pairs.jsonl#chosen,rejected"
PAIRS = {
    "data__sources": (SOURCE,),
    "data__validation": 0.2,
    "data__seq_len": 48,
    "train__stage": "dense",
    "train__learning_rate": 1e-2,
    "finetune__loss": "dpo",
    "evaluate__problems": 0,
    "evaluate__text_batches": 1,
    "evaluate__infill_documents": 0,
} | NO_MTP
START = {"train__stage": "dense", "train__steps": 1, "train__eval_batches": 0} | NO_MTP


@pytest.fixture(autouse=True)
def in_a_place_with_pairs(tmp_path, monkeypatch):
    """And one device, which compiles in half the time of eight."""
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": f"{n}+1?", "chosen": f"it is {n + 1}", "rejected": f"no {n}"} for n in range(200)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    devices = jax.devices()[:1]
    monkeypatch.setattr(setup, "make_mesh", lambda mesh, _: make_mesh(mesh, devices))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run that others begin from."""
    workdir = tmp_path_factory.mktemp("start")
    assert pretrain.run(tiny(**START), workdir)
    return workdir


def config_of(init_from: str = "", **changes: Any) -> Config:
    return dataclasses.replace(tiny(**PAIRS | changes), init_from=init_from)


def lines(workdir: str) -> list[dict]:
    return [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [0, 2])
def test_stopped_and_resumed_is_bit_identical_though_the_source_goes_on(lora, start, monkeypatch):
    """The reference is the source as it was; of adapters it is their base, without a copy."""
    shutil.copytree(start, "start")
    config = config_of("start", train__lora=lora, train__microbatches=2)
    assert finetune.run(config, Path("whole"))
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not finetune.run(config, Path("parts"))
    assert pretrain.run(tiny(**START | {"train__steps": 2}), Path("start"))
    assert finetune.run(config, Path("parts"))
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    trained = [(step, loss) for step, loss in losses(Path("whole")) if loss is not None]
    assert [each for each in losses(Path("parts")) if each[1] is not None] == trained
    kept, first = Path("whole/reference").exists(), lines("whole")[0]
    assert kept == (lora == 0)
    # Of a policy that is its reference, by two programs.
    assert first["preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    if not lora:
        record = json.loads(Path("whole/reference.json").read_text())
        assert record == {"source": "start/checkpoints/1", "step": 1}
        shutil.rmtree("parts/reference")
        with pytest.raises(UserError, match=r"parts/reference: the parameters of the reference"):
            finetune.run(dataclasses.replace(config, train=longer(config)), Path("parts"))


def longer(config: Config):
    return dataclasses.replace(config.train, steps=config.train.steps + 1)


@pytest.mark.parametrize(
    ("loss", "conditions"), [("dpo?nll=0.5", ["nll"]), ("orpo", ["nll", "orpo"]), ("simpo", [])]
)
def test_a_run_tells_pairs_apart_and_is_evaluated_as_it_was(loss, conditions, capsys):
    """Answers of a kind are told from those of another in a few steps, on held-out pairs too."""
    config = config_of(finetune__loss=loss, train__steps=8, train__eval_every=4)
    assert finetune.run(config, Path("run"))
    said = capsys.readouterr().out
    assert ("reference   random parameters" in said) == loss.startswith("dpo")
    assert "run: 8 of 8 steps, validation_rewards/accuracies 1" in said
    validated = [line for line in lines("run") if "validation_loss" in line]
    assert [line["step"] for line in validated] == [4, 8]
    assert validated[-1]["validation_rewards/accuracies"] == 1
    assert validated[-1]["validation_preference_loss"] < validated[0]["validation_preference_loss"]
    found = evaluate.run(config, Path("run"))
    assert found == {
        name.replace("validation_", "held_out_"): value
        for name, value in validated[-1].items()
        if name.startswith("validation_")
    }
    assert written_by("run") == pair_metrics(*conditions)


def test_an_evaluation_without_the_reference_says_so(capsys, start):
    """As of another place's results."""
    config = config_of(str(start), train__steps=1, train__eval_batches=0)
    assert finetune.run(config, Path("run"))
    Path("run/reference.json").unlink()
    assert evaluate.run(config, Path("run")) == {}
    assert "left out: run keeps no reference to compare with" in capsys.readouterr().out
    sources = dataclasses.replace(config.data, sources=(SOURCE.partition(",")[0],))
    with pytest.raises(UserError, match=r"finetune.loss = 'dpo': learns from pairs, and"):
        evaluate.run(dataclasses.replace(config, data=sources), Path("run"))


def test_mtp_modules_learn_nothing_and_do_not_decay():
    """Between two checkpoints of a run with a weight for them, and decay."""
    changes = {"train__steps": 2, "train__save_every": 1, "train__weight_decay": 0.5}
    changes |= {"model__num_nextn_predict_layers": 1, "train__eval_batches": 0}
    config = config_of(finetune__loss="simpo", **changes)
    assert config.train.mtp_weight > 0 and finetune.run(config, Path("run"))
    model = setup.with_vocab_size(config.model, load_tokenizer(Path("run/tokenizer.json")))
    first, last = (
        load_variables(model, make_mesh(config.mesh), f"run/checkpoints/{step}")["params"]
        for step in (1, 2)
    )
    modules = [name for name in first if name.startswith("mtp_")]
    assert modules
    for name in modules:
        chex.assert_trees_all_equal(first[name], last[name])
    assert not np.array_equal(first["embedding"], last["embedding"])


def test_a_workdir_that_an_error_left_free_has_no_reference_of_before(start):
    """A bad pair ends the run before its first step; the next one begins from another model."""
    shutil.copy("pairs.jsonl", "good.jsonl")
    Path("pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}')
    first = config_of(str(start), data__validation=0.0, train__eval_batches=0)
    with pytest.raises(UserError, match=r'fields "chosen" and "rejected" are the same'):
        finetune.run(first, Path("run"))
    shutil.copy("good.jsonl", "pairs.jsonl")
    assert finetune.run(config_of(train__steps=1, train__eval_batches=0), Path("run"))
    assert json.loads(Path("run/reference.json").read_text()) == {"source": "", "step": 0}
    with Checkpoints(Path("run/reference"), keep=1) as kept:
        assert kept.latest() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"finetune__loss": "next_token"},
            r"finetune.loss = 'next_token': data.sources has pairs; learn from them by 'dpo'",
        ),
        (
            {"data__sources": ("task:arithmetic?count=200&style=chat",)},
            r"finetune.loss = 'dpo': learns from pairs, and data.sources = .* has none; name two",
        ),
        ({"train__stage": "warmup"}, r"'warmup' trains the indexer alone"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(changes, message):
    with pytest.raises(UserError, match=message):
        finetune.run(config_of(**changes), Path("run"))
    assert not Path("run").exists()


def test_another_s_whole_state_has_no_reference(start):
    config = dataclasses.replace(config_of(str(start)), init_state="all")
    with pytest.raises(UserError, match=r"init_state = 'all': finetune.loss = 'dpo' compares with"):
        finetune.run(config, Path("run"))


def test_pretraining_refuses_pairs():
    with pytest.raises(UserError, match=r"pairs, which launch.finetune learns from"):
        pretrain.run(config_of(), Path("run"))
