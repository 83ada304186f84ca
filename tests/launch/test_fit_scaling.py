"""launch.fit_scaling on metrics of runs whose curve is known."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from experiment.command_line import command
from experiment.reporting import write_report
from launch import fit_scaling
from train.metrics import Metrics

TOKENS = 1_000  # sampled in a step
CEILING, EXPONENT, MIDDLE = 0.85, 2.5, 12_000.0


def write_run(workdir: Path, steps: int = 40, seed: int = 0, *, flat: bool = False) -> None:
    """Metrics of a run that is evaluated after each step, and logged after every other."""
    rng = np.random.default_rng(seed)
    with Metrics(workdir, "reinforce") as metrics:
        for step in range(1, steps + 1):
            if step == 1 or step % 2 == 0:
                metrics.write(step, {"reward": 0.5, "loss": 0.0, "tokens": TOKENS})
            solved = 0.2 + (CEILING - 0.2) / (1 + (MIDDLE / (step * TOKENS)) ** EXPONENT)
            solved = 0.4 if flat else solved
            noise = 0.01 * rng.normal()
            metrics.write(step, {"validation_pass_at_1": solved + noise})


def run(*words: str) -> None:
    command(fit_scaling.run, config="none", workdir=False, flags=fit_scaling.FLAGS, argv=words)


def scaling(directory: Path) -> dict:
    return json.loads((directory / "scaling.json").read_text())


def test_it_finds_what_made_the_curve(tmp_path, capsys):
    """Against generated tokens, of which every other step was logged."""
    write_run(tmp_path)
    run(f"--workdir={tmp_path}", "--bootstrap=200")
    found = scaling(tmp_path)
    (fit,) = found["fits"]
    for name, true in (("A", CEILING), ("B", EXPONENT), ("C_mid", MIDDLE)):
        assert fit[name]["low"] < fit[name]["mean"] < fit[name]["high"], name
        assert fit[name]["mean"] == pytest.approx(true, rel=0.1), name
    assert found["bootstrap"] == "residuals" and found["x"] == "generated tokens"
    errors = found["runs"][0]["prediction"]
    assert errors["sigmoid"] < errors["power_law"] and errors["sigmoid"] < errors["constant"]
    said = capsys.readouterr().out
    assert "C_mid" in said and "second half from the first" in said


def test_the_picture_is_an_svg_that_needs_nothing(tmp_path):
    write_run(tmp_path)
    run(f"--workdir={tmp_path}", "--bootstrap=20")
    text = (tmp_path / "scaling.svg").read_text()
    ElementTree.fromstring(text)
    assert "var(" not in text and "href" not in text and 'class="band"' in text


def test_the_report_shows_it(tmp_path):
    write_run(tmp_path)
    run(f"--workdir={tmp_path}", "--bootstrap=20")
    page = write_report(tmp_path).read_text()
    assert "Pass rate against compute" in page and "C_mid" in page


def test_early_points_may_be_left_out_and_steps_be_the_compute(tmp_path):
    write_run(tmp_path / "a")
    run(
        f"--workdir={tmp_path / 'a'}",
        "--skip=5",
        "--x=steps",
        f"--out={tmp_path}",
        "--bootstrap=20",
    )
    found = scaling(tmp_path)
    assert not (tmp_path / "a" / "scaling.json").exists()
    assert [x for x, _ in found["runs"][0]["left_out"]] == [1, 2, 3, 4, 5]
    assert found["runs"][0]["points"][0][0] == 6 and found["fits"][0]["points"] == 35
    assert found["fits"][0]["C_mid"]["mean"] == pytest.approx(MIDDLE / TOKENS, rel=0.1)


def test_several_runs_have_a_curve_each_or_one(tmp_path):
    names = [tmp_path / name for name in ("a", "b")]
    for seed, name in enumerate(names):
        write_run(name, seed=seed)
    flags = [f"--workdir={name}" for name in names]
    run(*flags, "--bootstrap=20")
    found = scaling(tmp_path / "a")
    assert [fit["run"] for fit in found["fits"]] == list(map(str, names))
    run(*flags, "--pool", "--bootstrap=20")
    (fit,) = scaling(tmp_path / "a")["fits"]
    assert fit["run"] == "all" and fit["points"] == 80
    assert scaling(tmp_path / "a")["bootstrap"] == "runs, then residuals"


def test_a_short_run_foretells_nothing(tmp_path, capsys):
    write_run(tmp_path / "short", steps=11)
    run(f"--workdir={tmp_path / 'short'}", "--bootstrap=20")
    assert scaling(tmp_path / "short")["runs"][0]["prediction"] is None
    assert "fewer than 12 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "error: --workdir is missing"),
        (
            ("--workdir=short",),
            "error: short: validation_pass_at_1 against tokens: 5 points",
        ),
        (
            ("--workdir=flat",),
            "error: flat: validation_pass_at_1 against tokens: the curve",
        ),
        (("--workdir=none",), "error: none: no metrics.jsonl, so not the workdir of a run"),
        (
            ("--workdir=flat", "--metric=lm"),
            "error: flat: no lm in metrics.jsonl (has",
        ),
        (("--workdir=flat", "--skip=-1"), "error: --skip=-1: must not be negative"),
        (
            ("--workdir=flat", "--skip=90"),
            "error: flat: validation_pass_at_1 against tokens: 0",
        ),
        (("--workdir=flat", "--x=hours"), "error: flag --x=hours"),
    ],
)
def test_what_is_no_curve_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("short"), steps=5)
    write_run(Path("flat"), flat=True)
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1, said


def test_a_run_that_was_not_evaluated_says_what_evaluates_it(tmp_path):
    with Metrics(tmp_path, "reinforce") as metrics:
        metrics.write(1, {"reward": 0.5, "loss": 0.0, "tokens": 5})
    with pytest.raises(UserError, match=r"--config.train.eval_every=N"):
        fit_scaling.run((str(tmp_path),), "tokens", "validation_pass_at_1", 0, False, 10, "")
