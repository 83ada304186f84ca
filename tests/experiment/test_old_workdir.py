"""A workdir made before config fields were renamed still samples, evaluates and resumes.

old_workdir/ has what the code before the renaming (commit 9ba7c40) made of old_workdir/config.py on
eight pretended CPU devices, with XLA_FLAGS=--xla_backend_optimization_level=0:

    workdir.tar.gz  W of launch.pretrain --config=config.py --workdir=W: two steps, sparse
    expected.json   "sample": launch.sample --workdir=W --chat="1+1?" --config.sampling.max_new=24
                    --config.sampling.temperature=0.0 (keys are made otherwise today)
                    "evaluation": launch.evaluate --workdir=W, its infilling and recall
                    "resumed": metrics of launch.pretrain ... --config.train.steps=3, times left out
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import chex
import pytest

from errors import UserError
from experiment import runs
from experiment.command_line import command
from experiment.config_files import get_config
from experiment.schema import parse
from experiment.workdir import record_config, recorded_config
from launch import sample

OLD = Path(__file__).parent / "old_workdir"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# With those flags the values are the same to the bit on the machine that made them. Other flags,
# CPUs and versions of XLA sum in another order, in float32.
RTOL = 1e-5
# What a suffix saves is a difference of two losses of 6 nats, so its error is theirs: absolute, and
# at most six units in the last place of a float32 of that size.
SAVING_ATOL = 3e-6


@pytest.fixture
def workdir(tmp_path) -> Path:
    with tarfile.open(OLD / "workdir.tar.gz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def read_metrics(workdir: Path, step: int) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("time", "tokens_per_s")}
        for line in lines
        if line["step"] == step
    ]


def test_the_record_is_read_with_the_new_names(workdir):
    config = parse(recorded_config(workdir))
    assert (config.model.hidden_size, config.model.mla.kv_lora_rank) == (8, 4)
    assert (config.model.delta.conv_kernel_dim, config.model.expert_matmul) == (2, "bucketed")
    assert (config.data.seq_len, config.sampling.max_new_tokens) == (128, 8)


def test_going_on_compares_by_the_new_names_and_records_them(workdir):
    config = parse(recorded_config(workdir))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=16))
    with pytest.raises(UserError, match=r"model\.hidden_size: 8 there, 16 here"):
        record_config(workdir, other, "pretrain")
    assert "query_rank" in (workdir / "config.json").read_text()
    record_config(workdir, config, "pretrain")
    assert "query_rank" not in (workdir / "config.json").read_text()
    assert parse(recorded_config(workdir)) == config


def test_an_old_config_file_is_answered_with_the_new_name():
    with pytest.raises(UserError, match=r"config.py:\d+: attention: .*\(it is now model.mla\)"):
        get_config(str(OLD / "config.py"))


@pytest.mark.command
def test_it_samples_what_the_old_code_samples(workdir, capsys):
    argv = [f"--workdir={workdir}", "--chat=1+1?", "--config.sampling.max_new_tokens=24"]
    argv.append("--config.sampling.temperature=0.0")
    command(sample.run, config="recorded", flags=sample.FLAGS, argv=argv)
    assert capsys.readouterr().out.endswith("devices\n" + EXPECTED["sample"])


def without_savings(evaluation: dict) -> tuple[dict, dict]:
    """Returns what suffixes save, by source and name, and the evaluation without it."""
    saved = {
        (source, name): value
        for source, values in evaluation["infilling"].items()
        for name, value in values.items()
        if name.startswith("suffix_saves")
    }
    losses = {
        source: {name: value for name, value in values.items() if (source, name) not in saved}
        for source, values in evaluation["infilling"].items()
    }
    return saved, evaluation | {"infilling": losses}


@pytest.mark.command
def test_it_evaluates_and_resumes_as_with_the_old_code(workdir):
    """The step's loss shows the parameters and the place in the data, the validation after it what
    the optimizer made of them. Metrics that did not exist then are not compared.
    """
    config = parse(recorded_config(workdir))
    infilling = dataclasses.replace(config.evaluate, problems=0, text_batches=0)
    found = runs.evaluate(dataclasses.replace(config, evaluate=infilling), workdir)
    saved, rest = without_savings(found)
    expected_saved, expected_rest = without_savings(EXPECTED["evaluation"])
    assert saved
    chex.assert_trees_all_close(saved, expected_saved, rtol=0, atol=SAVING_ATOL)
    chex.assert_trees_all_close(rest, expected_rest, rtol=RTOL, atol=0)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    assert runs.pretrain(longer, workdir)
    found = read_metrics(workdir, step=3)
    assert [line.pop("stage") for line in found] == ["pretrain", "pretrain"]
    expected = [
        {name: value for name, value in line.items() if name != "stage"}
        for line in EXPECTED["resumed"]
    ]
    old = [{name: line[name] for name in was} for line, was in zip(found, expected, strict=True)]
    chex.assert_trees_all_close(old, expected, rtol=RTOL, atol=0)


def test_the_documented_lines_sample_from_it(workdir, capsys):
    """The Python of docs/engine.md, with another workdir in it."""
    page = (Path(__file__).parents[2] / "docs/engine.md").read_text()
    lines = page.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) == 10
    exec(lines.replace("runs/quickstart/reinforce", str(workdir)).replace(", 64, ", ", 8, "), {})
    assert capsys.readouterr().out.count("\n") >= 4
