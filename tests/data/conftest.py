"""Fixtures: a corpus of text files, its config, and a checkpoint's tokenizer with its template."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from data.config import DataConfig
from data.tokenizer_files import load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"


@pytest.fixture
def corpus(tmp_path):
    """Twelve files of different lengths, from a line to several chunks, in three scripts."""
    for number in range(12):
        lines = [
            f"file {number} line {line}: naïve 你好 🙂 = {number * line}\n"
            for line in range(1 + 17 * number)
        ]
        (tmp_path / f"{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(corpus):
    """A function of the fields to change that makes a config which reads the corpus."""
    base = DataConfig(
        sources=(f"text:{corpus}/*.txt",),
        validation=0.3,
        seq_len=64,
        batch_size=4,
        fim_rate=0.0,
        fim_sources=("text",),
        cross_document_attention=False,
    )
    return lambda **changes: dataclasses.replace(base, **changes)


# Text of each added token, and whether the file flags it as special. As in real checkpoints some
# control tokens are not flagged.
ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<｜begin▁of▁sentence｜>": True,
    "<｜end▁of▁sentence｜>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<|system|>": True,
    "<|user|>": True,
    "<|assistant|>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
    "    ": False,
}


@pytest.fixture
def checkpoint(tmp_path):
    """A function that makes a directory with a byte-level tokenizer and a chat template.

    The tokenizer has 258 entries and ADDED; the template is one of tests/data/templates, or none.
    Further files are given by name, without ".json", and content.
    """

    def make(template: str | None, tokenizer_config: dict | None = None, **files: dict) -> Path:
        directory = tmp_path / "checkpoint"
        directory.mkdir(exist_ok=True)
        vocab = {
            char: index
            for index, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "hi"])
        }
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("h", "i")]))
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.add_tokens(
            [AddedToken(text, special=special, normalized=False) for text, special in ADDED.items()]
        )
        backend.save(str(directory / "tokenizer.json"))
        if template is not None:
            (directory / "chat_template.jinja").write_text(
                (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"), encoding="utf-8"
            )
        for name, content in {
            "tokenizer_config": tokenizer_config or {"eos_token": "<|im_end|>"},
            **files,
        }.items():
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return directory

    return make


CONFIGS = {
    "chatml": {"eos_token": "<|im_end|>"},
    "r1": {
        "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
        "eos_token": "<｜end▁of▁sentence｜>",
    },
    "speaker": {"eos_token": "<|endoftext|>"},
}


@pytest.fixture
def template(checkpoint):
    """A function that loads the chat template of this name from tests/data/templates."""
    return lambda name: load_tokenizer(checkpoint(name, CONFIGS[name])).chat_template
