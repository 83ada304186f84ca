"""A run on a disk that may not be written to: what reads works, what writes says so in one line."""

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import pretrain
from tests.full_disk import small_disk
from tests.launch.test_training_commands import DENSE, tiny

pytestmark = pytest.mark.command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Iterator[Path]:
    """A run of one step in a file system that is read-only from then on."""
    with small_disk(tmp_path_factory.mktemp("disk") / "mounted", 64_000) as disk:
        config = tiny(**DENSE)
        mla = dataclasses.replace(config.model.mla, gate="none")  # which can be exported
        model = dataclasses.replace(config.model, mtp_input="normed", mla=mla)
        assert pretrain.run(dataclasses.replace(config, model=model), disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk / "run"


@pytest.fixture
def ends(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Returns a function of a command line: its exit code, its output and its errors."""

    def run(module: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *words])
        monkeypatch.delitem(sys.modules, f"launch.{module}", raising=False)
        try:
            runpy.run_module(f"launch.{module}", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_what_reads_works(run_dir, ends, tmp_path):
    code, said, _ = ends("sample", f"--workdir={run_dir}", "--prompt=1 + 1")
    assert code == 0 and said
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({"input_ids": [[1, 2, 3]]}))
    words = [f"--model={run_dir}", f"--tokens={tokens}"]
    assert ends("score", *words, f"--out={tmp_path / 'scores.npz'}")[0] == 0
    assert ends("report", f"--workdir={run_dir}", f"--out={tmp_path / 'report.html'}")[0] == 0


def test_what_writes_says_so_in_one_line(run_dir, ends, tmp_path):
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({"input_ids": [[1, 2, 3]]}))
    scores = [f"--model={run_dir}", f"--tokens={tokens}", f"--out={run_dir / 'scores.npz'}"]
    for module, *words in (
        ("report", f"--workdir={run_dir}"),
        ("score", *scores),
        ("pretrain", "--config=configs/tiny_dsv3.py", f"--workdir={run_dir}"),
        ("convert", f"--from={run_dir}", f"--to=hf:{run_dir / 'hf'}"),
    ):
        code, _, errors = ends(module, *words)
        lines = errors.strip().splitlines()
        assert code == 2, (module, errors)
        assert "Read-only file system" in lines[-1] or "may not be written to" in lines[-1]
        assert str(run_dir) in lines[-1]


def test_an_evaluation_is_printed_before_it_cannot_be_written(run_dir, ends):
    fewer = ["--config.evaluate.problems=0", "--config.evaluate.infill_documents=0"]
    fewer += ["--config.evaluate.text_batches=1"]
    code, said, errors = ends("evaluate", f"--workdir={run_dir}", *fewer)
    assert code == 2 and "held_out_loss" in said
    assert "Read-only file system" in errors.strip().splitlines()[-1]
