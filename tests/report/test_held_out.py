"""Charts of held-out problems: each where its file is, and none where a file has other things."""

import json
from pathlib import Path

import pytest

from experiment.reporting import write_report
from report.held_out import held_out_panels
from report.results import FILES, read_run

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}
ROWS = [{"k": k} | INTERVAL for k in (1, 2, 4)]
GROUP = {"difficulty": "level 5", "problems": 7, "pass@1": INTERVAL}
EVALUATION = {
    "pass_at_k": ROWS,
    "cons_at_k": ROWS,
    "mean_at_n": {"n": 4} | INTERVAL,
    "problems": 7,
    "samples": 4,
    "by_difficulty": [GROUP],
    "temperatures": [{"temperature": 0.6, "pass_at_k": ROWS}],
    "thinking": [
        {"thinking": n, "thinking_tokens": n - 0.5, "accuracy": INTERVAL} for n in (8, 16)
    ],
}
COMPARISON = {
    "a": {"workdir": "runs/base"},
    "b": {"workdir": "runs/rl"},
    "differences": [{"measure": m, "a": 0.1} | row for row in ROWS for m in ("pass", "cons")],
    "by_pass_rate": [{"difficulty": "never", "problems": 3} | INTERVAL],
    "sampling_efficiency_gap": {"k": 4, "is": "pass@4(a) - pass@1(b)"} | INTERVAL,
}
QUANTILES = {"0.05": 1.1, "0.5": 1.5, "0.95": 4.0}
PERPLEXITY = {
    "model": "runs/base",
    "of_a": {"quantiles": QUANTILES},
    "of_b": {"quantiles": QUANTILES},
}
SCALING = {
    "x": "steps",
    "metric": "validation_pass_at_1",
    "runs": [{"points": [[1, 0.2], [2, 0.3]]}],
    "fits": [
        {
            "run": "runs/rl",
            "curve": [[1, 0.2, 0.1, 0.3], [9, 0.3, 0.2, 0.4]],
            "power_law": [[1, 0.2], [9, 0.3]],
        }
        | dict.fromkeys(("A", "B", "C_mid"), INTERVAL)
    ],
}
CONTENTS = {
    "evaluation": EVALUATION,
    "comparison": COMPARISON,
    "perplexity": PERPLEXITY,
    "scaling": SCALING,
}
TITLES = {
    "evaluation": [
        "One of k, and the vote of k",
        "pass@k by temperature",
        "Solved by difficulty",
        "Accuracy by length of thought",
    ],
    "comparison": ["Gain over the base", "Gain by how often the base solves it"],
    "perplexity": ["What the base thinks of it"],
    "scaling": ["Pass rate against compute"],
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_its_charts_and_no_others(name, tmp_path):
    (tmp_path / FILES[name]).write_text(json.dumps(CONTENTS[name]))
    page = write_report(tmp_path).read_text()
    for other, titles in TITLES.items():
        for title in titles:
            assert (f"<h3>{title}</h3>" in page) == (other == name), title


def test_numbers_stand_in_the_chart_they_belong_to(tmp_path):
    (tmp_path / FILES["comparison"]).write_text(json.dumps(COMPARISON))
    (tmp_path / FILES["evaluation"]).write_text(json.dumps(EVALUATION))
    page = write_report(tmp_path).read_text()
    assert "pass@4(a) - pass@1(b): 0.500 (0.400 to 0.600)" in page
    assert "runs/rl minus runs/base" in page
    assert "majority of all samples right" in page and "50.0%" in page


def damaged(value):
    """Yields a value with each of its parts made something else."""
    yield "x"
    yield None
    if isinstance(value, dict):
        for name in value:
            yield {key: item for key, item in value.items() if key != name}
            for other in damaged(value[name]):
                yield value | {name: other}
    elif isinstance(value, list):
        yield []
        for other in damaged(value[0]):
            yield [other, *value[1:]]
    else:
        yield -1
        yield float("nan")


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_a_file_makes_no_error(name):
    for value in damaged(CONTENTS[name]):
        if isinstance(value, dict):
            held_out_panels({name: value})


def test_a_quickstart_shows_what_was_measured_after_it(tmp_path):
    """In a directory of the evaluation, of either time, or of a phase."""
    for place, name in (
        ("after", "evaluation"),
        ("before", "comparison"),
        ("reinforce", "scaling"),
    ):
        directory = tmp_path / place
        directory.mkdir()
        (directory / FILES[name]).write_text(json.dumps(CONTENTS[name]))
    (tmp_path / "reinforce" / "metrics.jsonl").write_text('{"step": 1, "stage": "reinforce"}\n')
    measured = read_run(tmp_path, lambda place: None).measured
    assert {name for name, content in measured.items() if content} == {
        "evaluation",
        "comparison",
        "scaling",
    }


def test_a_damaged_file_is_noted_once(tmp_path):
    (tmp_path / FILES["evaluation"]).write_text("{")
    notes = read_run(Path(tmp_path), lambda place: None).notes
    assert len(notes) == 1 and "evaluation.json: left out" in notes[0]
