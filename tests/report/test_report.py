"""The report shows what there is, says what is not, and needs nothing but itself."""

import io
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from rich.console import Console

from errors import UserError
from report.figures import line
from report.page import write_report
from report.results import read_phases
from report.table import print_table
from train.metrics import Metrics


def pass_at_k(means: dict[int, float]) -> list[dict[str, float]]:
    return [{"k": k, "mean": m, "low": m - 0.05, "high": m + 0.05} for k, m in means.items()]


SUMMARY = {
    "pretrain": {
        "loss_first": 6.239,
        "loss_last": 2.412,
        "tokens": 1_228_800,
        "tokens_per_s": 9_204.7,
        "middle_loss_with_suffix": 2.18,
        "middle_loss_without_suffix": 2.74,
        "middle_loss_empty_suffix": 2.69,
        "infilling": {
            "text:*.py": {
                "suffix_saves_over_without_suffix": {"mean": 0.56, "low": 0.41, "high": 0.7},
                "suffix_saves_over_empty_suffix": {"mean": 0.51, "low": 0.37, "high": 0.66},
            }
        },
    },
    "indexer": {"recall": 0.912, "recall_random": 0.264, "topk": 64, "context": 256},
    "reinforce": {
        "algorithm": "dr_grpo",
        "pass@1_before": 0.213,
        "pass@1_after": 0.671,
        "pass@8_before": 0.604,
        "pass@8_after": 0.893,
        "problems": 128,
        "samples": 8,
        "pass_at_k_before": pass_at_k({1: 0.213, 2: 0.34, 4: 0.48, 8: 0.604}),
        "pass_at_k_after": pass_at_k({1: 0.671, 2: 0.76, 4: 0.84, 8: 0.893}),
    },
    "seconds": 843.2,
    "devices": "2 CPU cores",
    "versions": {"jax": "0.12.0.1", "flax": "0.12.12", "python": "3.13"},
}

TITLES = (
    "Loss",
    "Infilling",
    "Indexer divergence",
    "Attention kept",
    "Load of the experts",
    "Busiest expert",
    "Fine-tuning loss",
    "pass@k",
    "Reward",
    "Completion length",
    "Entropy",
    "Sampler and trainer apart",
    "Clipped tokens",
    "Groups without a signal",
)


def write_phase(workdir: Path, phase: str, steps: int, values) -> None:
    with Metrics(workdir / phase, phase) as metrics:
        for step in range(1, steps + 1):
            line = values(step, step / steps)
            if step == steps:
                line["expert_load"] = [
                    [random.gauss(1, 0.5 if phase == "pretrain" else 0.25) % 3 for _ in range(8)]
                    for _ in range(5)
                ]
            metrics.write(step, line)


def write_quickstart(workdir: Path) -> None:
    """Plausible data of every kind: noisy, a NaN among them, samples with markup in them."""
    random.seed(0)

    def language(first, last, **more):
        def values(step, done):
            lm = last + (first - last) * math.exp(-5 * done) + random.gauss(0, 0.06)
            line = {
                "lm": lm,
                "loss": lm + 0.5,
                "mtp_1": lm + 0.4,
                "grad_norm": 1 + random.random(),
                "expert_load_max": 1.1 + 1.5 * math.exp(-6 * done),
            }
            if step % 40 == 0:
                line["validation_lm"] = lm + 0.08
            return line | {name: value(done) for name, value in more.items()}

        return values

    def reward(step, done):
        solved = 0.2 + 0.55 / (1 + math.exp(6 - 12 * done)) + random.gauss(0, 0.04)
        return {
            "reward": solved + 0.09,
            "answer_reward": solved,
            "format_reward": 0.09,
            "completion_length": 34 - 10 * done + random.gauss(0, 1),
            "entropy": 0.3 + 0.5 * math.exp(-3 * done),
            "clip_fraction": 0.01 + 0.02 * random.random(),
            "kl": math.nan,
            "zero_variance_groups": 0.2 + 0.4 * done,
            "logprob_gap_max": 2e-5 * (1 + random.random()),
            "logprob_gap_mean": 4e-7 * (1 + random.random()),
        }

    recall = {
        "indexer_recall": lambda done: 0.3 + 0.6 * (1 - math.exp(-4 * done)),
        "indexer_recall_random": lambda done: 0.26 + random.gauss(0, 0.01),
    }
    write_phase(workdir, "pretrain", 300, language(6.2, 2.4))
    write_phase(
        workdir,
        "warmup",
        80,
        language(2.4, 2.4, indexer_kl=lambda done: 1.4 * math.exp(-3 * done) + 0.1, **recall),
    )
    write_phase(
        workdir,
        "sparse",
        120,
        language(
            2.5,
            2.35,
            indexer_kl=lambda done: 0.2 - 0.1 * done,
            indexer_recall=lambda done: 0.9 + 0.01 * done,
        ),
    )
    write_phase(workdir, "finetune", 150, language(3.1, 0.4))
    write_phase(workdir, "reinforce", 100, reward)
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    for when, right in (("before", 0.2), ("after", 0.8)):
        (workdir / when).mkdir()
        with (workdir / when / "samples.jsonl").open("w") as file:
            for problem in range(8):
                a, b = 13 * problem % 40, 7 * problem % 30
                for _ in range(2):
                    good = random.random() < right
                    result = a + b if good else a - b
                    doubt = "" if good else ", or is it less < more?"
                    thought = f"<think>{a} + {b}: {a} and {b} make {result}{doubt}</think>"
                    cut = right <= 0.5 and problem % 3 == 0
                    completion = thought[:-8] if cut else f"{thought}<answer>{result}</answer>"
                    prompt = f"<|user|>What is {a} + {b}?<|assistant|>"
                    sample = {
                        "prompt": prompt,
                        "completion": completion,
                        "reward": 1.1 if good else 0.1,
                        "answer": str(a + b),
                    }
                    file.write(json.dumps(sample) + "\n")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    write_quickstart(workdir)
    return workdir


@pytest.fixture(scope="module")
def page(quickstart) -> str:
    return write_report(quickstart).read_text()


class WellFormed(HTMLParser):
    """Every tag closed in order; collects what would be fetched."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "action")
            and not (value or "").startswith(("#", "data:"))
        ]
        self.fetched += [tag] * (tag in ("script", "link", "iframe", "object"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"


def test_whole_report_has_every_panel(page):
    assert [title for title in TITLES if f"<h3>{title}</h3><svg" not in page] == []
    assert 'class="missing"' not in page


def test_page_is_well_formed_and_needs_no_network(page):
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == [] and parser.fetched == []
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page) and "@import" not in page


def test_charts_follow_the_theme(page):
    """No colour of its own in any chart: all are variables, which the dark theme sets anew."""
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == len(TITLES)
    assert [
        color
        for chart in charts
        for color in re.findall(r"(?:fill|stroke): (?!none|var\(--)[^;\"]+", chart)
        if "opacity" not in color
    ] == []


def test_numbers_are_there(page):
    for number in (
        "6.24 → 2.41 nats/token",
        "1,228,800",
        "91% (at random 26%)",
        "64 of 256",
        "dr_grpo",
        "21.3% → 67.1%",
        "128 held-out problems × 8",
    ):
        assert number in page
    assert "0:14:03" in page and "jax 0.12.0.1, flax 0.12.12" in page


def test_samples_are_escaped_and_coloured(page):
    assert (
        '<span class="think">&lt;think&gt;0 + 0' in page
        and '<span class="answer">&lt;answer&gt;' in page
    )
    assert "less &lt; more?" in page and '<span class="marker">&lt;|user|&gt;</span>' in page
    assert page.count('<article class="sample">') == 6


def test_same_data_same_page(quickstart, page):
    assert write_report(quickstart).read_text() == page
    left = [path.name for path in quickstart.iterdir() if "report.html" in path.name]
    assert left == ["report.html"], "no temporary file is left"


@pytest.mark.parametrize("phase", ["pretrain", "sparse", "reinforce"])
def test_workdir_of_one_phase(quickstart, phase):
    page = write_report(quickstart / phase).read_text()
    shown = [title for title in TITLES if f"<h3>{title}</h3><svg" in page]
    expected = {
        "pretrain": ["Loss", "Load of the experts", "Busiest expert"],
        "sparse": [
            "Loss",
            "Indexer divergence",
            "Attention kept",
            "Load of the experts",
            "Busiest expert",
        ],
        "reinforce": [
            "Reward",
            "Completion length",
            "Entropy",
            "Sampler and trainer apart",
            "Clipped tokens",
            "Groups without a signal",
        ],
    }
    assert shown == expected[phase]
    noted = [title for title in TITLES if f"<b>{title}</b>" in page]
    assert sorted(shown + noted) == sorted(TITLES)
    assert "<b>Numbers</b> no summary.json" in page and "<b>Samples</b>" in page


def test_half_a_summary(tmp_path):
    """A run that never came to RL, and one line of metrics that is all NaN."""
    summary = {
        "pretrain": {"loss_first": 6.0, "loss_last": None},
        "reinforce": {"pass_at_k_after": SUMMARY["reinforce"]["pass_at_k_after"]},
        "seconds": None,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(1, {"lm": math.nan, "expert_load_max": 1.0})
    page = write_report(tmp_path).read_text()
    assert (
        "<h3>pass@k</h3><svg" in page
        and "<h3>Busiest expert</h3><svg" in page
        and "<b>Loss</b>" in page
    )


def test_large_model_keeps_the_page_small(tmp_path):
    """58 layers of 256 experts: a picture, not 15,000 shapes."""
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(
            1, {"expert_load": [[random.random() for _ in range(256)] for _ in range(58)]}
        )
    page = write_report(tmp_path).read_text()
    assert "<h3>Load of the experts</h3><svg" in page and len(page) < 100_000


def test_running_mean_keeps_to_its_phase():
    """A jump between phases stays a jump, and a straight line a straight line: no lag, no smear."""
    y = np.concatenate([np.arange(50.0), 1000 + np.arange(50.0)])
    axes = matplotlib.figure.Figure().add_subplot()
    line(axes, np.arange(1, 101), y, "black", starts=[0, 50])
    np.testing.assert_allclose(np.asarray(axes.lines[-1].get_ydata(), float), y)


@pytest.mark.command
def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, launch.report, report.page; assert 'matplotlib' not in sys.modules"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="nothing to report there"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[1]"),
        ("summary.json", "{"),
        ("metrics.jsonl", "x\n"),
        ("before/samples.jsonl", '{"prompt": "p"}\n'),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(tmp_path)


def test_phases_in_the_order_they_ran(quickstart):
    assert list(read_phases(quickstart)) == [
        "pretrain",
        "warmup",
        "sparse",
        "finetune",
        "reinforce",
    ]


def test_table_on_the_terminal():
    out = io.StringIO()
    print_table(SUMMARY, Console(file=out, width=100))
    text = out.getvalue()
    assert "Pretraining" in text and "21.3% → 67.1%" in text and "0:14:03" in text
    out.truncate(0)
    print_table({}, Console(file=out))
    assert not out.getvalue().strip("\0")


def test_what_the_suffix_saves_of_both_baselines_stands_for_each_source(page):
    assert "suffix saves, text:*.py" in page and "0.560 of left to right, 0.510 of withheld" in page
