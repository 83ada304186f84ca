"""A branch takes another run's whole state: what it computes is what that run would have."""

import dataclasses

import pytest

from data.config import DataConfig
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from experiment.branch import branch_of
from experiment.runs import check_reinforce
from experiment.schema import Config
from experiment.workdir import record_config
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny
from train.config import TrainConfig
from train.loop import train_language_model
from train.metrics import read_metrics
from train.restore import Branch
from train.setup import Setup


@pytest.fixture
def recorded(tmp_path):
    """A function of changes that returns the branch of a config with these, off a recorded run."""
    run = tmp_path / "run"
    record_config(run, Config(), "pretrain")

    def branch(command="pretrain", seed=0, steps=1_000, **data):
        ours = Config(
            seed=seed,
            init_from=str(run),
            init_state="all",
            data=dataclasses.replace(DataConfig(), **data),
            train=TrainConfig(steps=steps),
        )
        return branch_of(ours, command, tmp_path / "mine")

    return branch


def test_the_same_data_go_on_and_others_begin_anew(recorded, capsys):
    assert recorded(steps=2_000) == Branch(2_000, same_data=True)
    for changes in ({}, {"bad_records": "skip"}):
        assert recorded(**changes) == Branch(1_000, same_data=True)
        assert capsys.readouterr().out.endswith("; the data go on\n")
    for changes, name in (
        ({"sources": ("stdlib", "stdlib"), "mixture": (1.0, 2.0)}, "data.sources"),
        ({"seq_len": 512}, "data.seq_len"),
        ({"fim_rate": 0.0}, "data.fim_rate"),
        ({"seed": 1}, "seed"),
        ({"command": "finetune"}, "the command"),
    ):
        assert recorded(**changes) == Branch(1_000, same_data=False)
        assert f"the data begin anew ({name} differs)" in capsys.readouterr().out


def test_a_run_with_a_checkpoint_of_its_own_does_not_branch_again(recorded, tmp_path):
    (tmp_path / "mine/checkpoints/7").mkdir(parents=True)
    assert recorded() is None


def test_parameters_alone_are_no_branch(tmp_path):
    assert branch_of(Config(init_from="anywhere"), "pretrain", tmp_path) is None


@pytest.mark.parametrize("init_from", ["", "hf:somewhere"])
def test_it_needs_a_run(init_from):
    with pytest.raises(UserError, match=r"config\.init_state = 'all': needs init_from"):
        Config(init_from=init_from, init_state="all")
    with pytest.raises(UserError, match=r"config\.init_state = 'some': must be one of"):
        Config(init_from="run", init_state="some")


def test_reinforcement_refuses_it():
    with pytest.raises(UserError, match=r"init_state = 'all': launch\.reinforce has an optimizer"):
        check_reinforce(Config(init_from="run", init_state="all"))


@pytest.mark.heavy
def test_a_branch_computes_what_the_run_would_have(tmp_path):
    """With the same schedule and data, to the bit; other data begin anew; other optimizers fail."""
    tokenizer = bytes_tokenizer()
    setup = Setup(
        dataclasses.replace(tiny.MODEL, vocab_size=tokenizer.vocab_size, num_hidden_layers=1),
        tokenizer,
        make_mesh(MeshConfig()),
    )
    train = TrainConfig(
        steps=3,
        log_every=1,
        save_every=100,
        eval_batches=0,
        mtp_weight=0.0,
        warmup_steps=1,
        constant_steps=100,
    )
    data = DataConfig(seq_len=32)

    def run(name, steps, data=data, init_from="", same_data=True, **changes):
        branch = Branch(steps, same_data) if init_from else None
        train_language_model(
            setup,
            dataclasses.replace(train, steps=steps, **changes),
            data,
            tmp_path / name,
            phase="pretrain",
            chat=False,
            init_from=str(tmp_path / init_from) if init_from else "",
            seed=0,
            branch=branch,
        )
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return {line["step"]: (line["lm"], line["grad_norm"]) for line in lines}

    run("trunk", 3)
    branched = run("branch", 5, init_from="trunk")
    with pytest.raises(UserError, match=r"train\.steps = 3: init_from = .* has done 3 steps"):
        run("late", 3, init_from="trunk")
    anew = run("anew", 5, init_from="trunk", same_data=False)
    with pytest.raises(UserError, match=r"trunk/checkpoints/3: "):
        run("muon", 5, init_from="trunk", optimizer="muon")
    whole = run("trunk", 5)
    assert list(branched) == list(anew) == [4, 5]
    assert branched == {step: whole[step] for step in (4, 5)}
    assert anew[4] != branched[4]
