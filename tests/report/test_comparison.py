"""Several runs are one table, and a curve each in the same charts; a sweep has its own page."""

import json
import re
from pathlib import Path

import pytest

from errors import UserError
from experiment.reporting import write_report
from report.comparison import compared, run_names
from report.results import Origin, read_run
from tests.report.test_page import parsed, shown


def write_run(workdir: Path, last: float, steps: int = 20, **more) -> Path:
    workdir.mkdir(parents=True)
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            lm = last + (steps - step) / steps
            line = {"step": step, "stage": "pretrain", "time": step, "lm": lm, "loss": lm, **more}
            file.write(json.dumps(line | {"validation_lm": lm + 0.1}) + "\n")
    return workdir


def test_runs_are_overlaid(tmp_path):
    a, b = write_run(tmp_path / "a", 2.0), write_run(tmp_path / "b", 3.0, steps=40, grad_norm=1.0)
    path = write_report(a, b)
    assert path == tmp_path / "comparison.html"
    page = path.read_text()
    assert shown(page) == ["Loss", "Validation loss", "Gradient norm"]
    loss, _, norm = parsed(page).charts
    assert [one["name"] for one in loss["series"]] == ["a", "b"]
    assert [one["points"][-1] for one in loss["series"]] == [[20, 2], [40, 3]]
    colors = [one["color"] for one in loss["series"]]
    assert len(set(colors)) == 2 and [one["name"] for one in norm["series"]] == ["b"]
    assert norm["series"][0]["color"] == colors[1], "a run has one colour on all of the page"
    assert [color in page.partition("</table>")[0] for color in colors] == [True, True]


def test_a_workdir_given_twice_is_one_run(tmp_path):
    a = write_run(tmp_path / "a", 2.0)
    (tmp_path / "b").mkdir()
    path = write_report(a, a, tmp_path / "b/../a")
    assert path == a / "report.html"
    page = path.read_text()
    assert "A language model" in page and "runs side by side" not in page


def test_the_table_has_what_differs(tmp_path):
    origins = {
        "a": Origin("pretrain", seed=0, changes={"train.steps": 20, "train.beta1": 0.5}),
        "b": Origin("pretrain", seed=1, changes={"train.steps": 20, "model.x": "y"}),
    }
    runs = [
        read_run(write_run(tmp_path / name, 2.0), lambda _, name=name: origins[name])
        for name in origins
    ]
    found = compared("t", runs)
    assert [*found.columns] == [
        "seed",
        "train.beta1",
        "model.x",
        "steps",
        "time",
        "loss",
        "validation loss",
    ]
    assert [row[:4] for row in found.rows] == [("0", "0.5", "", "20"), ("1", "", "y", "20")]
    assert [row[-2:] for row in found.rows] == [("2", "2.1"), ("2", "2.1")]


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_names([Path("/r/a/x"), Path("/r/b/x")]) == ["a/x", "b/x"]
    assert run_names([Path("/r/a/x"), Path("/r/a/y")]) == ["x", "y"]


def test_a_directory_of_runs_is_compared(tmp_path):
    for name in ("one", "two", "three"):
        write_run(tmp_path / "all" / name, 2.0)
    (tmp_path / "all" / "notes").mkdir()
    page = write_report(tmp_path / "all").read_text()
    assert "3 runs side by side." in page and "<h1>all</h1>" in page


def sweep_of(tmp_path: Path, count: int) -> Path:
    records = []
    for number in range(count):
        name = f"train.learning_rate={number}"
        write_run(tmp_path / "s" / name, float(number), steps=400)
        records.append(
            {
                "name": name,
                "changes": {"train.learning_rate": number},
                "exit": None if number == 1 else 0,
                "seconds": 61.0,
                "results": {"pretrain.loss_last": number + 0.123456},
            }
        )
    results = {"question": "Which <rate>?", "columns": ["pretrain.loss_last"], "runs": records}
    (tmp_path / "s" / "results.json").write_text(json.dumps(results))
    return tmp_path / "s"


def test_a_sweep_has_its_question_one_table_and_overlaid_curves(tmp_path):
    sweep = sweep_of(tmp_path, 3)
    page = write_report(sweep).read_text()
    assert '<p class="lead">Which &lt;rate&gt;?</p>' in page
    head, *rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert re.findall(r"<th.*?>(.*?)</th>", head) == [
        "run",
        "train.learning_rate",
        "pretrain.loss_last",
        "time",
        "ended",
    ]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row)[1:] for row in rows]
    assert cells[0] == ["0", "0.12346", "1 min 1 s", "finished"]
    assert cells[1] == ["1", "1.1235", "1 min 1 s", "not finished"] and len(cells) == 3
    (loss, *_) = parsed(page).charts
    assert [one["name"] for one in loss["series"]] == [
        "1, learning_rate 0",
        "2, learning_rate 1",
        "3, learning_rate 2",
    ]


def test_a_sweep_of_many_runs_stays_small_and_each_has_its_colour(tmp_path):
    page = write_report(sweep_of(tmp_path, 60)).read_text()
    assert len(page) < 3_000_000
    (loss, *_) = parsed(page).charts
    colors = [one["color"] for one in loss["series"]]
    assert len(set(colors)) == 60 and all(page.count(f"--{color}:hsl(") == 2 for color in colors)


def test_conversations_and_rewards_are_not_on_the_curve_of_text(tmp_path):
    """The runs of a pipeline compare what they learn from text, whatever follows it."""
    for name in ("a", "b"):
        write_run(tmp_path / name / "pretrain", 2.0)
        write_run(tmp_path / name / "warmup", 2.0, indexer_kl=1.0)
        write_run(tmp_path / name / "finetune", 0.5)
        write_run(tmp_path / name / "reinforce", 0.5, reward=0.3)
    page = write_report(tmp_path / "a", tmp_path / "b").read_text()
    charts = dict(zip(shown(page), parsed(page).charts, strict=True))
    assert [one["points"][-1] for one in charts["Loss"]["series"]] == [[40, 2]] * 2
    assert charts["Loss"]["phases"] == [[0, "pretrain"], [20, "warmup"]]
    assert [one["points"][0][0] for one in charts["Reward"]["series"]] == [1, 1]
    cells = re.findall(r"<td.*?>(.*?)</td>", page)
    assert "2" in cells and "0.5" not in cells


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}', '{"runs": [1, {"name": "../a"}]}'])
def test_a_damaged_record_of_a_sweep_is_no_traceback(tmp_path, text):
    sweep = sweep_of(tmp_path, 2)
    write_run(tmp_path / "a", 2.0)
    (sweep / "results.json").write_text(text)
    try:
        assert "Loss" in shown(write_report(sweep).read_text())
    except UserError as error:
        assert "nothing to report" in str(error)
