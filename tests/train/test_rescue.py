"""An error in the middle of a run: the steps done are saved, and the run goes on from there."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from checkpoints.cursors import Place
from checkpoints.training import Checkpoints
from data.config import DataConfig
from data.documents import uniform_hash
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny
from train.config import TrainConfig
from train.loop import train_language_model
from train.metrics import read_metrics
from train.rescue import SavedOnError
from train.setup import Setup


class Cursor:
    """A place in data that is a number."""

    def __init__(self, place=0):
        self.place = place

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def train_until(directory, error, steps=3, delete=False):
    """Makes steps, each of which reads one thing, and ends with an error after reading another."""
    cursor = Cursor()
    with Checkpoints(directory, keep=2) as checkpoints, SavedOnError(checkpoints) as newest:
        for step in range(1, steps + 1):
            cursor.place += 1
            state = {"step": jax.numpy.full(3, step)}
            newest.is_at(step, state, Place.of(cursor))
        cursor.place += 1
        if delete:
            state["step"].delete()
        raise error


def restored(directory):
    cursor = Cursor()
    with Checkpoints(directory, keep=2) as checkpoints:
        state = checkpoints.restore({"step": jax.ShapeDtypeStruct((3,), np.int32)}, cursor)
    return int(state["step"][0]), cursor.place


def test_the_newest_step_is_saved_with_the_cursor_behind_its_batch(tmp_path):
    with pytest.raises(UserError, match=r"^a\.jsonl:3: null; step 3 is saved$"):
        train_until(tmp_path, UserError("a.jsonl:3: null"))
    assert restored(tmp_path) == (3, 3)


def test_an_error_of_ours_keeps_its_kind(tmp_path):
    with pytest.raises(KeyError) as error:
        train_until(tmp_path, KeyError("x"))
    assert error.value.__notes__ == ["step 3 is saved"]
    assert restored(tmp_path) == (3, 3)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_leave_does_not_wait(tmp_path, kind):
    with pytest.raises(kind):
        train_until(tmp_path, kind())
    assert not list(tmp_path.glob("[0-9]*"))


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    with pytest.raises(UserError, match=r"^wrong$"):
        train_until(tmp_path, UserError("wrong"), steps=0)
    assert not list(tmp_path.glob("[0-9]*"))


def test_a_state_that_went_with_the_error_is_not_saved(tmp_path):
    """A step that fails has taken the buffers of the state before it."""
    with pytest.raises(UserError, match=r"^wrong$"):
        train_until(tmp_path, UserError("wrong"), delete=True)
    assert not list(tmp_path.glob("[0-9]*"))


@pytest.mark.heavy
def test_a_run_that_a_bad_record_stopped_goes_on_when_it_skips(tmp_path):
    """It ends with the parameters and metrics of a run that skipped from its start."""
    lines = [json.dumps({"t": f"{n} " + "word " * (n % 9)}) for n in range(60)]
    lines[31:31] = ['{"t": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = bytes_tokenizer()
    setup = Setup(
        dataclasses.replace(tiny.MODEL, vocab_size=tokenizer.vocab_size, num_hidden_layers=1),
        tokenizer,
        make_mesh(MeshConfig()),
    )
    train = TrainConfig(steps=8, log_every=1, save_every=100, eval_batches=0, mtp_weight=0.0)
    stop = DataConfig(
        sources=(f"jsonl:{tmp_path}/a.jsonl#t",), validation=0.0, seq_len=32, fim_rate=0.5
    )
    skip = dataclasses.replace(stop, bad_records="skip")

    def run(name, data):
        train_language_model(
            setup, train, data, tmp_path / name, phase="pretrain", chat=False, init_from="", seed=0
        )

    with pytest.raises(UserError, match=r"a\.jsonl:32: .* is null.*; step \d is saved$"):
        run("one", stop)
    before = read_metrics(tmp_path / "one/metrics.jsonl")
    assert 0 < before[-1]["step"] < 8
    with pytest.raises(UserError, match=r"a\.jsonl:32"):
        run("one", stop)
    run("one", skip)
    run("two", skip)
    one, two = (
        [
            {key: value for key, value in line.items() if key not in ("time", "tokens_per_s")}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("one", "two")
    )
    assert one == two and [line["step"] for line in one] == list(range(1, 9))
    assert one[-1]["bad_records"] >= 1 and "fim_share" in one[-1]


@pytest.mark.heavy
def test_an_evaluation_that_failed_is_made_when_the_run_goes_on(tmp_path):
    """The error comes after the last step, which is saved: nothing but the evaluation is left."""
    tokenizer = bytes_tokenizer()
    setup = Setup(
        dataclasses.replace(tiny.MODEL, vocab_size=tokenizer.vocab_size, num_hidden_layers=1),
        tokenizer,
        make_mesh(MeshConfig()),
    )
    train = TrainConfig(steps=2, log_every=1, eval_batches=1, mtp_weight=0.0)
    path = tmp_path / "a.jsonl"
    data = DataConfig(
        sources=(f"jsonl:{path}#t",), validation=0.5, seq_len=32, fim_rate=0.0, bad_records="stop"
    )
    is_training = [uniform_hash(f"a.jsonl:{number}") >= 0.5 for number in range(40)]
    lines = ['{"t": "word word"}' if training else "{}" for training in is_training]
    path.write_text("\n".join(lines))

    def run():
        return train_language_model(
            setup, train, data, tmp_path / "run", phase="pretrain", chat=False, init_from="", seed=0
        )

    for _ in range(2):  # the same command stops there again
        with pytest.raises(UserError, match=r'a\.jsonl:\d+: no field "t"'):
            run()
    path.write_text("\n".join(['{"t": "word word"}'] * 40))
    assert run()
    assert run()
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 2]
    assert "validation_lm" in found[-1]
