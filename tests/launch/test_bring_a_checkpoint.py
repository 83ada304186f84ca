"""A stranger's checkpoint, with a tokenizer and a chat template of its own, does all a run does.

It is sampled, fine-tuned, reinforced, evaluated and written back, as a user would.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.hf.safetensors import TensorFiles
from configs import base
from data.chat import encode_prompt
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.command_line import command
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.schema import Config, parse
from experiment.workdir import recorded_config
from launch import convert, evaluate, finetune, reinforce, sample
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests.tiny_checkpoint import MODEL, write_checkpoint, write_tokenizer
from train.restore import load_variables

pytestmark = pytest.mark.command


@pytest.fixture
def brought(tmp_path) -> Path:
    """A Qwen3-MoE of random numbers with its tokenizer, template and license."""
    directory = write_checkpoint(tmp_path / "brought", eos_token_id=257)
    write_tokenizer(directory)
    (directory / "LICENSE").write_text("do as you like\n")
    return directory


def configured(origin: Path | str, **changes) -> Config:
    """configs/base.py, made small, from a checkpoint; `section__field=value` changes a field."""
    c = base.get_config()
    c.data.seq_len, c.data.batch_size, c.data.fim_rate = 64, 8, 0.0
    c.train.update(
        {
            "steps": 2,
            "warmup_steps": 1,
            "log_every": 1,
            "eval_batches": 0,
            "stage": "dense",
            "balance_weight": 0.0,
        }
    )
    c.sampling.update({"max_prompt_tokens": 160, "max_new_tokens": 6})
    c.reinforce.update({"prompts_per_step": 8, "group_size": 2})
    c.evaluate.update({"problems": 4, "samples": 2, "infill_documents": 0, "bootstrap": 10})
    c.init_from = str(origin)
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return parse(with_checkpoint_fields(c, ()))


def chats(directory: Path) -> Path:
    """Two turns, the first with a thought that the template drops later."""
    path = directory / "chats.jsonl"
    turns = [
        ("user", "2+2?"),
        ("assistant", "<think>easy</think>4"),
        ("user", "and 3?"),
        ("assistant", "<think>4+3</think>7"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(40)))
    return path


def test_its_template_makes_the_prompt(brought, capsys, monkeypatch):
    """launch.sample by its command line: the ids that reach the model are those of the rendered
    conversation.
    """
    seen = []
    plain = sample.Prompt
    monkeypatch.setattr(
        sample, "Prompt", lambda tokens, *rest: seen.append(tokens) or plain(tokens, *rest)
    )
    before = sorted(file.name for file in brought.iterdir())
    command(
        sample.run,
        config="recorded",
        flags=sample.FLAGS,
        argv=[f"--workdir=hf:{brought}", "--chat=2+2?", "--config.sampling.max_new_tokens=3"],
    )
    assert (
        all(
            row == load_tokenizer(brought).encode_rendered("<|user|>2+2?<|assistant|>")
            for row in seen
        )
        and seen
    )
    assert sorted(file.name for file in brought.iterdir()) == before


def test_a_second_turn_sees_the_first_by_its_template(brought, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "print_completion", lambda *words: seen.append(words[1]) or [70])
    argv = [f"--workdir=hf:{brought}", "--chat=2+2?", "--chat=and 3?"]
    command(sample.run, config="recorded", flags=sample.FLAGS, argv=argv)
    tokenizer = load_tokenizer(brought)
    answer = tokenizer.decode([70], skip_special_tokens=False).strip()
    messages = [("user", "2+2?"), ("assistant", answer), ("user", "and 3?")]
    assert seen[1:] == [
        encode_prompt(
            [{"role": role, "content": content} for role, content in messages],
            tokenizer,
            "checkpoint",
        )
    ]


def test_it_is_fine_tuned_reinforced_evaluated_and_written_back(brought, tmp_path):
    """hf:DIR is fine-tuned on its template, that run is reinforced and evaluated, written back with
    all that came along, and read again.
    """
    tuned = configured(f"hf:{brought}", data__sources=(f"jsonl:{chats(tmp_path)}#messages",))
    assert (
        tuned.data.chat_template == "checkpoint"
        and tuned.model.gqa.num_attention_heads == MODEL.gqa.num_attention_heads
    )
    assert finetune.run(tuned, tmp_path / "tuned")

    rl = configured(tmp_path / "tuned")
    assert rl.model == tuned.model and rl.data.chat_template == "checkpoint"
    assert reinforce.run(rl, tmp_path / "rl")
    assert "pass_at_k" in evaluate.run(parse(recorded_config(tmp_path / "rl")), tmp_path / "rl")

    back = tmp_path / "back"
    convert.run(to=f"hf:{back}", dtype="", **{"from": str(tmp_path / "rl")})
    assert {file.name for file in back.iterdir()} == {file.name for file in brought.iterdir()}
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json"):
        assert (back / name).read_bytes() == (brought / name).read_bytes()
    before, after = TensorFiles(brought), TensorFiles(back)
    assert set(before.tensors) == set(after.tensors) and not np.array_equal(
        before.read("lm_head.weight"), after.read("lm_head.weight")
    )
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    ours, theirs = (
        load_variables(rl.model, mesh, origin) for origin in (tmp_path / "rl", f"hf:{back}")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_workdir_to_write_to_is_no_checkpoint(brought, capsys):
    with pytest.raises(SystemExit) as stop:
        command(finetune.run, argv=["--config=configs/base.py", f"--workdir=hf:{brought}"])
    assert stop.value.code == 2 and "this command writes there" in capsys.readouterr().err


def test_a_converted_workdir_brings_its_model(brought, tmp_path):
    """A config file that starts from it needs to say nothing of the model."""
    convert.run(to=str(tmp_path / "converted"), dtype="", **{"from": f"hf:{brought}"})
    config = configured(
        tmp_path / "converted", data__sources=(f"jsonl:{chats(tmp_path)}#messages",)
    )
    assert (
        config.model == configured(f"hf:{brought}").model
        and config.data.chat_template == "checkpoint"
    )
    assert finetune.run(config, tmp_path / "tuned")


def test_no_such_checkpoint_is_one_line(tmp_path):
    for origin, words in (
        (f"hf:{tmp_path / 'nowhere'}", "no such directory"),
        (f"hf:{tmp_path}", "no safetensors files there"),
    ):
        with pytest.raises(UserError, match=words):
            with_checkpoint_fields(base_config_from(origin), ())
