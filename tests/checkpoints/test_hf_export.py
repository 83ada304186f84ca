"""What an export writes beside tensors: keys that every reader takes, and nothing of before lost.

Transformers 4.57 and 5 were run on such exports: docs/checkpoints.md says with what result.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints.convert import ExportSource, export_checkpoint, source_of_checkpoint
from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.config import config_json, export_refusals, model_fields
from checkpoints.hf.config_keys import field_of, with_fields
from checkpoints.hf.safetensors import TensorFiles
from data.chat import encode_chat, encode_prompt, jinja_of
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer, train_bpe
from errors import UserError
from experiment.model_source import with_hf_fields
from experiment.schema import default_config, parse
from model.config import ModelConfig
from tests.model.golden import GOLDEN, model

YARN = {
    "rope.rope_theta": 700.0,
    "rope.factor": 8.0,
    "rope.original_max_position_embeddings": 16,
    "rope.attention_factor": 1.2,
}
CHANGES = {
    "YaRN": YARN,
    "theta": {"rope.rope_theta": 123.0},
    "no YaRN": {"rope.factor": 1.0, "rope.attention_factor": 1.0, "mla.logit_scale": 1.0},
    "experts": {"moe.num_experts_per_tok": 1},
}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}


def exported(case: str, directory: Path, changes: dict) -> tuple[ModelConfig, dict]:
    """Exports a golden checkpoint with fields of its model changed; returns model and config."""
    source = source_of_checkpoint(HFCheckpoint(GOLDEN / case, model(case)))
    changed = with_fields(source.model, changes)
    export_checkpoint(dataclasses.replace(source, model=changed), directory, "")
    return changed, json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(
    "case",
    ["deepseek_v3", "deepseek_v3_released", "deepseek_v32", "qwen3", "qwen3_moe", "qwen3_next"],
)
def test_a_changed_model_keeps_every_other_key(case, what, tmp_path):
    """What is read back is the model; the ids, the context and all else are as they came."""
    changed, keys = exported(case, tmp_path / "out", CHANGES[what])
    before = json.loads((GOLDEN / case / "config.json").read_text())
    touched = ROPE | {"max_position_embeddings"} if "rope" in str(CHANGES[what]) else set()
    touched |= {"num_experts_per_tok"} if what == "experts" else set()
    kept = {name: value for name, value in before.items() if name not in touched}
    assert {name: keys.get(name) for name in kept} == kept
    found = model_fields(tmp_path / "out", TensorFiles(tmp_path / "out").tensors)
    for name, value in found.items():
        if name != "dtype":
            expected = field_of(changed, name)
            assert value == (pytest.approx(expected) if isinstance(value, float) else expected)


@pytest.mark.parametrize("case", ["deepseek_v3_released", "deepseek_v32", "qwen3", "qwen3_next"])
def test_rope_is_written_as_every_reader_takes_it(case, tmp_path):
    """Transformers 4 reads rope_theta and rope_scaling alone, transformers 5 rope_parameters."""
    _, keys = exported(case, tmp_path / "stretched", YARN)
    scaling = keys["rope_scaling"]
    assert keys["rope_theta"] == 700.0 and keys["max_position_embeddings"] == 8 * 16
    assert scaling["rope_type"] == "yarn" and scaling["factor"] == 8.0
    assert scaling["original_max_position_embeddings"] == 16
    assert scaling["attention_factor"] == 1.2
    assert {**scaling, "rope_theta": 700.0}.items() <= keys["rope_parameters"].items()
    partial = {"qwen3_next": 0.25}.get(case)
    assert keys.get("partial_rotary_factor") == partial
    assert keys["rope_parameters"].get("partial_rotary_factor") == partial
    _, keys = exported(case, tmp_path / "plain", CHANGES["no YaRN"] | CHANGES["theta"])
    assert keys["rope_theta"] == 123.0
    assert keys["rope_scaling"] is None and keys["rope_parameters"]["rope_type"] == "default"


def test_mscales_say_what_attention_factor_says(tmp_path):
    """Some readers of DeepSeek's files know those keys only."""
    _, keys = exported("deepseek_v3", tmp_path, YARN | {"mla.logit_scale": 1.3})
    rope = keys["rope_scaling"]
    cos, logits = (
        0.1 * rope[name] * np.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim")
    )
    assert logits**2 == pytest.approx(1.3) and cos / logits == pytest.approx(1.2)


def made_here(directory: Path, tokenizer, template: str = "think") -> dict:
    """Exports a model of random numbers that comes from no checkpoint; returns config.json."""
    made = dataclasses.replace(model("deepseek_v3"), vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)

    def rows(tensor, start, stop):
        return rng.normal(size=(stop - start, *tensor.shape[1:])).astype(np.float32)

    source = ExportSource(made, rows, {}, None, "here", tokenizer, jinja_of(template), context=384)
    export_checkpoint(source, directory, "")
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(["ab ab ba"] * 9, 280)


def test_a_model_made_here_says_where_it_begins_and_ends(tokenizer, tmp_path):
    """Where a key is missing, readers take the defaults of the model's family: other ids."""
    keys = made_here(tmp_path, tokenizer)
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    assert {name: keys[f"{name}_token_id"] for name in ids} == ids
    rope = model("deepseek_v3").rope
    context = rope.factor * rope.original_max_position_embeddings
    assert keys["max_position_embeddings"] == (384 if rope.factor == 1 else context)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: generation[f"{name}_token_id"] for name in ids} == ids
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    read = load_tokenizer(tmp_path)
    assert (read.bos, read.eos, read.pad, read.stops, read.vocab_size) == (
        *ids.values(),
        tokenizer.stops,
        tokenizer.vocab_size,
    )
    assert read.encode("ab <|eos|> é") == tokenizer.encode("ab <|eos|> é")


@pytest.mark.parametrize("template", ["think", "r1"])
def test_a_template_of_ours_goes_along_as_jinja(tokenizer, template, tmp_path):
    """The exported model reads conversations in the ids that it was trained on."""
    made_here(tmp_path, tokenizer, template)
    read = load_tokenizer(tmp_path)
    thought = "<think>1+1</think><answer>2</answer>"
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "and é\n?"},
        {"role": "assistant", "content": "<answer>3</answer>", "reasoning_content": "2+1"},
    ]
    for count in (2, 4):
        assert encode_prompt(messages[:count], read, "checkpoint") == encode_prompt(
            messages[:count], tokenizer, template
        )
    assert encode_chat(messages, read, "checkpoint") == encode_chat(messages, tokenizer, template)
    assert parse(with_hf_fields(default_config(), tmp_path)).data.chat_template == "checkpoint"


@pytest.mark.parametrize("before, after", [("think", "checkpoint"), ("r1", "r1")])
def test_a_checkpoint_without_a_template_is_not_taken_for_ours(tmp_path, before, after):
    """What a config file says of a base model stays; "think", its default, does not."""
    made_here(tmp_path, bytes_tokenizer())
    (tmp_path / "chat_template.jinja").unlink()
    config = default_config()
    config.data.chat_template = before
    assert parse(with_hf_fields(config, tmp_path)).data.chat_template == after


def test_what_cannot_be_exported_is_known_before_training():
    """All fields of it, each with what it must be."""
    assert export_refusals(model("qwen3_next")) == []
    refused = export_refusals(ModelConfig(vocab_size=512))
    assert refused == [
        "model.mtp_input = 'residual' (must be normed)",
        "model.mla.gate = 'element' (must be none)",
    ]
    plain = with_fields(ModelConfig(vocab_size=512), {"mtp_input": "normed", "mla.gate": "none"})
    assert export_refusals(plain) == [] and config_json(plain, "float32")["index_n_heads"] == 4


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_released", "qwen3"])
def test_a_larger_vocabulary_has_the_mean_of_the_others(case, tmp_path):
    """A tokenizer may have more entries than the embedding; no other tensor may have fewer rows."""
    before = model(case)
    grown = dataclasses.replace(before, vocab_size=before.vocab_size + 5)
    checkpoint = HFCheckpoint(GOLDEN / case, grown)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in checkpoint.files.tensors:
            continue
        rows = checkpoint.rows(name, 0, grown.vocab_size)
        old = TensorFiles(GOLDEN / case).read(name)
        assert rows.dtype == old.dtype and np.array_equal(rows[:-5], old)
        mean = old.astype(np.float64).mean(axis=0).astype(old.dtype)
        assert (rows[-5:] == mean).all()
        assert (checkpoint.rows(name, len(rows) - 2, len(rows)) == mean).all()
    export_checkpoint(source_of_checkpoint(checkpoint), tmp_path / "grown", "")
    keys = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert keys["vocab_size"] == grown.vocab_size
    tensors = HFCheckpoint(tmp_path / "grown", grown).files.tensors
    assert tensors["model.embed_tokens.weight"].shape[0] == grown.vocab_size
    wide = dataclasses.replace(before, intermediate_size=before.intermediate_size + 1)
    with pytest.raises(UserError, match=r"and config\.json calls for"):
        HFCheckpoint(GOLDEN / case, wide)
