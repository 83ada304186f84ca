"""Whatever a run's files and names have in them, its report is whole and says what it left out."""

import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from errors import UserError
from experiment.reporting import write_report
from report.lenient import matrix, number
from report.results import read_run
from report.table import print_table
from tests.report.test_page import parsed, shown
from tests.report.workdirs import SUMMARY, write_quickstart

# What breaks mathematical text, markup, attributes, scripts and templates.
NASTY = (
    "$x_1$ and $",
    r"\frac{1}{2} \n \u0000",
    "</script><script>alert(1)</script>",
    "\" onload='alert(1)' & < > ` ${body} $title $$",
    "<!-- <svg> --> ]]>",
    "ünï…日本\u2028\u202e",
    "\ud83d half",
    "\x00\x07\x1b[31m",
)


def metrics_line(step: int, **values) -> str:
    return json.dumps({"step": step, "stage": "pretrain", "time": step, "loss": 1.0, **values})


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_shown_as_it_is(tmp_path, text):
    name = "".join(c for c in text if c not in "/\0" and not "\ud800" <= c <= "\udfff") or "x"
    workdir = tmp_path / name
    workdir.mkdir()
    line = {"stage": text, "lm": 2.0, "reward": 0.1, f"{text}_reward": 0.2}
    lines = [json.dumps({"step": step, **line}) + "\n" for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    source = {"suffix_saves_over_empty_suffix": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    summary = {
        "pretrain": {"infilling": {text: source}},
        "reinforce": {"algorithm": text},
        "devices": text,
    }
    (workdir / "summary.json").write_text(json.dumps(summary))
    sample = {"prompt": text, "completion": text, "answer": text, "reward": 1.0}
    (workdir / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    plain = tmp_path / "plain"
    write_quickstart(plain)
    page = write_report(workdir).read_text(encoding="utf-8")
    found = parsed(page)
    assert found.fetched == [] and page.count("<script") == 1 and "alert(1)<" not in page
    assert page.count("</script>") == 1
    safe = "".join("\ufffd" if c in "\x00\x07\x1b\ud83d" else c for c in text)
    assert "".join(found.text).count(safe.strip()) >= 3
    assert {"Loss", "Reward", "Filling gaps"} & set(shown(page))
    out = io.StringIO()
    print_table(summary, Console(file=out, width=200))
    assert out.getvalue().encode() and "\x1b" not in out.getvalue()
    both = write_report(workdir, plain, out=tmp_path / "both.html").read_text(encoding="utf-8")
    assert parsed(both).fetched == [] and both.count("<script") == 1


def test_a_bad_line_is_left_out_and_said(tmp_path):
    """Every other line is there, and the page says which are not."""
    good = [metrics_line(step, lm=8.0 - step) for step in range(1, 6)]
    bad = [
        "x",
        "[1, 2]",
        "{}",
        '{"step": "3", "stage": "pretrain", "lm": 1}',
        '{"step": NaN, "stage": "pretrain"}',
        '{"step": true, "stage": "pretrain"}',
        '{"step": -1, "stage": "pretrain"}',
        '{"step": 7, "stage": ["pretrain"]}',
        '{"step": 1' + "0" * 400 + ', "stage": "pretrain"}',
        "[" * 100_000,
        "\0\0\0",
    ]
    text = "\n".join([*good, *bad]).encode() + b"\n\xff\xfe\n" + good[0][:20].encode()
    (tmp_path / "metrics.jsonl").write_bytes(text)
    run = read_run(tmp_path, lambda _: None)
    assert [line["lm"] for line in run.phases["pretrain"]] == [7.0, 6.0, 5.0, 4.0, 3.0]
    (note,) = run.notes
    assert note.endswith("13 lines (6, 7, 8, ...) are left out: no line of metrics, or cut short")
    page = write_report(tmp_path).read_text()
    assert "Left out" in page and "13 lines (6, 7, 8, ...)" in page


def test_odd_values_leave_the_rest_of_their_line(tmp_path):
    odd = ["NaN", "Infinity", "-Infinity", '"2.0"', "null", "[1]", "{}", "true", "1e39", "9" * 400]
    lines = [metrics_line(1, lm=2.0, grad_norm=1.0)]
    lines += [
        metrics_line(step, lm=2.5)[:-1] + f', "grad_norm": {value}}}'
        for step, value in enumerate(odd, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text()
    assert {"Loss", "Gradient norm"} == set(shown(page))
    charts = {chart["series"][0]["name"]: chart for chart in parsed(page).charts}
    assert charts["Gradient norm"]["series"][0]["points"] == [[1, 1]]
    assert len(charts["training"]["series"][0]["points"]) == 11
    # A list is no scalar at all, so that it is none of the odd ones.
    assert "pretrain: 9 of 10 values of grad_norm are no finite numbers and are left out" in page


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[1]"),
        ("summary.json", "{"),
        ("summary.json", "[" * 100_000),
        ("metrics.jsonl", "x\n"),
        ("before/samples.jsonl", '{"prompt": "p"}\n'),
        ("traces.jsonl", '{"step": 1}\n'),
        ("infills.jsonl", "1\n"),
        ("evaluation.json", "1"),
        ("config.json", "{"),
    ],
)
def test_a_broken_file_is_named_and_costs_nothing_else(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    if name != "config.json":
        with pytest.raises(UserError, match="nothing to report"):
            write_report(tmp_path)
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/metrics.jsonl").write_text(metrics_line(1, lm=2.0) + "\n")
    page = write_report(tmp_path).read_text()
    assert "Fine-tuning loss" in shown(page)
    assert Path(name).name in page.partition("Left out")[2]


def test_a_summary_of_any_values_makes_a_page(tmp_path):
    """Any leaf of the summary, or any branch, may be something else."""
    path = tmp_path / "summary.json"
    whole = json.dumps(SUMMARY)
    (tmp_path / "metrics.jsonl").write_text(metrics_line(1, lm=1.0) + "\n")

    def places(value, path=()):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield (*path, key)
            if isinstance(item, dict | list):
                yield from places(item, (*path, key))

    rng = random.Random(0)
    found = list(places(json.loads(whole)))
    strange = [None, "x", [], {}, [1], {"a": 1}, math.nan, math.inf, 10**400, -1, True, [[]]]
    for place in found:
        changed = json.loads(whole)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = rng.choice(strange)
        path.write_text(json.dumps(changed))
        page = write_report(tmp_path).read_text()
        assert "Phases" in page and "nan" not in " ".join(parsed(page).text).lower().split()


def test_steps_that_stand_twice_or_out_of_order_are_one_curve(tmp_path):
    """A run that was killed after its last checkpoint writes some steps again."""
    steps = [1, 2, 3, 4, 2, 3, 5]
    lines = [metrics_line(step, lm=float(place)) for place, step in enumerate(steps, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path, lambda _: None)
    found = [(line["step"], line["lm"]) for line in run.phases["pretrain"]]
    assert found == [(1, 1.0), (2, 5.0), (3, 6.0), (4, 4.0), (5, 7.0)]


def test_numbers_and_matrices():
    assert [number(value) for value in (1, 2.5, True, "1", None, math.nan, 10**400, 1e31)] == [
        1.0,
        2.5,
        *[None] * 6,
    ]
    np.testing.assert_array_equal(np.asarray(matrix([[1, 2], [3, 4]])), [[1, 2], [3, 4]])
    for odd in ([], [[]], [1], [[1], [1, 2]], [[None]], [["x"]], "x", {"a": 1}, [[1], 2]):
        assert matrix(odd) is None
