"""A corpus of a few text files, and the config that reads it."""

import dataclasses

import pytest

from data.config import DataConfig


@pytest.fixture
def corpus(tmp_path):
    """Twelve files, ragged: from one short line to several pieces, in three scripts."""
    for number in range(12):
        lines = [f"file {number} line {line}: naïve 你好 🙂 = {number * line}\n" for line in range(1 + 17 * number)]
        (tmp_path / f"{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(corpus):
    """Call it with the fields to change."""
    base = DataConfig(
        sources=(f"text:{corpus}/*.txt",),
        mixture=(1.0,),
        validation=0.3,
        sequence=64,
        batch=4,
        fim_rate=0.0,
        fim_spm=0.5,
        fim_sources=("text",),
        copy_rate=0.0,
        packing="split",
        cross_document_attention=False,
        template="think",
    )
    return lambda **changes: dataclasses.replace(base, **changes)
