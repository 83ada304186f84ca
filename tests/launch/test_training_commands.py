"""The training commands on a tiny model: stop and resume, bad gradients, whose workdir it is."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from checkpoints.training import Checkpoints
from configs import base
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.schema import Config, parse
from experiment.setup import run_variables, set_up, with_vocab_size
from launch import evaluate, finetune, pretrain, reinforce
from model.sharding import make_mesh
from train.interrupt import Interrupt
from train.restore import load_variables

pytestmark = pytest.mark.command


def tiny(**changes) -> Config:
    """A config of a few thousand parameters on bytes; `section__field=value` changes a field."""
    c = base.get_config()
    c.tokenizer.kind = "bytes"
    c.model.hidden_size, c.model.num_hidden_layers, c.model.intermediate_size = 16, 2, 32
    c.model.mla.update(
        {
            "num_attention_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
    )
    c.model.indexer.update({"n_heads": 2, "head_dim": 8, "rope_head_dim": 4, "topk": 8})
    c.model.moe.update({"num_experts": 4, "intermediate_size": 16})
    c.data.sources, c.data.mixture = ("task:arithmetic?count=200",), (1.0,)
    c.data.seq_len, c.data.batch_size, c.data.fim_rate = 32, 8, 0.0
    c.train.update(
        {"steps": 4, "warmup_steps": 1, "log_every": 1, "eval_batches": 1, "save_every": 100}
    )
    c.sampling.update({"max_prompt_tokens": 160, "max_new_tokens": 8})
    c.reinforce.update({"prompts_per_step": 8, "group_size": 2, "task": "task:arithmetic"})
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return parse(c)


def final_variables(config: Config, workdir: Path) -> dict:
    model = with_vocab_size(config.model, load_tokenizer(workdir / "tokenizer.json"))
    return jax.device_get(load_variables(model, make_mesh(config.mesh), workdir))


def losses(workdir: Path) -> list:
    """The loss of each line, None where it has an evaluation's; without what saving took."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line.get("loss")) for line in lines if "timing_s/save_checkpoint" not in line
    ]


def stopped_at(step: int, monkeypatch) -> None:
    """Asks to stop during `step`, as SIGTERM would."""
    monkeypatch.setattr(Interrupt, "stop_requested", lambda self, at: at == step)


# One step of dense training, run once: several tests start from it or look at it, and leave it as
# it is.
DENSE = {"train__steps": 1, "train__eval_batches": 0}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("dense")
    assert pretrain.run(tiny(**DENSE), workdir)
    return workdir


# Finetuning and reinforcement do without the MTP module, which pretraining has.
CHAT = {"data__sources": ("task:arithmetic?count=200&style=chat",)}
NO_MTP = {"model__num_nextn_predict_layers": 0}
COMMANDS = {
    "pretrain": (pretrain.run, {}),
    "finetune": (finetune.run, CHAT | NO_MTP),
    "reinforce": (reinforce.run, NO_MTP),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_and_resumed_is_bit_identical_to_never_stopped(name, tmp_path, monkeypatch):
    """Parameters, router bias and metrics: state, data cursor (in the middle of a packed row) and
    sampling keys all come back.
    """
    run, changes = COMMANDS[name]
    config = tiny(**changes, train__stage="sparse")
    assert run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not run(config, tmp_path / "parts")
    with Checkpoints(tmp_path / "parts" / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest() == 2
    assert run(config, tmp_path / "parts")
    chex.assert_trees_all_equal(
        final_variables(config, tmp_path / "parts"), final_variables(config, tmp_path / "whole")
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_an_evaluation_has_the_held_out_loss_of_training(tmp_path, capsys):
    """On lines of JSON: texts of a pretrained model, and conversations of a fine-tuned one, of
    which the assistant's words count. There is nothing to infill in conversations, and it says so.
    """
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "it is 4"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 100)
    numbers = (f"a text of some ten words, the number {number} one" for number in range(400))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in numbers))
    few = {"train__eval_batches": 2, "evaluate__text_batches": 2, "evaluate__problems": 0} | NO_MTP
    for run, name, source in (
        (pretrain.run, "text", f"jsonl:{texts}#text"),
        (finetune.run, "chat", f"jsonl:{chats}#messages"),
    ):
        config = tiny(
            **few,
            data__sources=(source,),
            data__seq_len=128,
            evaluate__infill_documents=2,
            evaluate__bootstrap=10,
            data__validation=0.3,
        )
        assert run(config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        capsys.readouterr()
        found = evaluate.run(config, tmp_path / name)
        assert found["held_out_loss"] == json.loads(lines[-1])["validation_lm"]
        assert ("infilling" in found) == (name == "text")
        said = capsys.readouterr().out
        assert ("infilling   left out: data.sources has no text" in said) == (name == "chat")
        assert f"held_out_loss                      {found['held_out_loss']:.3f}" in said


def test_a_finished_run_given_again_changes_nothing(dense_run):
    config = tiny(**DENSE)
    before = final_variables(config, dense_run)
    assert pretrain.run(config, dense_run)
    chex.assert_trees_all_equal(final_variables(config, dense_run), before)


def test_indexer_warmup_moves_the_indexer_alone(dense_run, tmp_path):
    warmup = tiny(
        train__stage="warmup",
        train__steps=2,
        train__learning_rate=0.1,
        train__eval_batches=0,
    )
    config = dataclasses.replace(warmup, init_from=str(dense_run))
    pretrain.run(config, tmp_path)
    before, after = final_variables(config, dense_run), final_variables(config, tmp_path)
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert moved == ("indexer" in name), name


def test_a_run_that_started_from_another_is_read_from_its_own_checkpoints(dense_run, tmp_path):
    """As launch.evaluate and launch.sample do, with the run's own config; from `init_from` only
    where there is no checkpoint.
    """
    config = dataclasses.replace(tiny(**DENSE), init_from=str(dense_run))
    pretrain.run(config, tmp_path / "second")
    first, second = (final_variables(config, path) for path in (dense_run, tmp_path / "second"))
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    setup = set_up(config, tmp_path / "second", rows={"rows": 8}, trains=True)

    def read(init_from: str, workdir: str) -> dict:
        return jax.device_get(run_variables(setup, init_from, tmp_path / workdir))

    chex.assert_trees_all_equal(read(config.init_from, "second"), second)
    chex.assert_trees_all_equal(read(config.init_from, "results"), first)
    with pytest.raises(
        UserError,
        match=r"init_from = 'elsewhere': .*second has checkpoints of its own; "
        r"to read 'elsewhere' give another --workdir",
    ):
        read("elsewhere", "second")


def test_gradients_that_are_never_finite_stop_the_run_with_one_line(tmp_path):
    config = tiny(
        train__learning_rate=1e30,
        train__max_skipped=3,
        train__steps=50,
        train__warmup_steps=0,
        train__eval_batches=0,
    )
    with pytest.raises(
        UserError, match=r"the gradients of the last 3 steps were not finite \(train.max_skipped\)"
    ):
        pretrain.run(config, tmp_path)


def test_a_workdir_of_another_config_is_refused(dense_run):
    with pytest.raises(
        UserError, match=r"belongs to another config \(train.learning_rate: 0.001 there, 0.5 here\)"
    ):
        pretrain.run(tiny(**DENSE, train__learning_rate=0.5), dense_run)


def test_a_checkpoint_that_does_not_fit_is_named(dense_run, tmp_path):
    config = dataclasses.replace(tiny(model__hidden_size=24), init_from=str(dense_run))
    with pytest.raises(UserError, match=r"is \[.*\] there, \[.*\] in this config"):
        pretrain.run(config, tmp_path / "wide")


def test_a_mesh_that_does_not_multiply_is_refused():
    with pytest.raises(UserError, match=r"needs 3 devices; this run sees 8 CPU device"):
        make_mesh(tiny(mesh__data=3).mesh)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"12 rows at a time do not divide over 8 devices"):
        pretrain.run(tiny(data__batch_size=12), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__stage": "dense"},
            "sampling.attention = 'sparse': must be 'dense', as train.stage is",
        ),
        ({"train__stage": "warmup"}, "train.stage = 'warmup': trains the indexer alone"),
        (
            {"train__stage": "sparse", "sampling__temperature": 0.0},
            "sampling.temperature = 0: all completions of a prompt would be the same",
        ),
        (
            {"train__stage": "sparse", "train__microbatches": 8, "reinforce__minibatches": 4},
            "train.microbatches = 8: does not divide reinforce.prompts_per_step .* = 4",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_refused_before_anything_is_written(
    changes, message, tmp_path
):
    with pytest.raises(UserError, match=message):
        reinforce.run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
